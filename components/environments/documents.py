"""Long documents: facts of one world as sentences, then questions that only those facts answer.

    ada works_in core . core led_by mona . ... ? ada works_in core . ? ...

A question repeats subject and relation of a fact far before it; its answer is the object. A reader with a short memory
cannot know it, because the facts are drawn anew for each document. A family gives the facts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from components.runtime.contracts import Document, Question, digest

Split = Literal["train", "validation", "test"]

SHORT_WORDS = 108  # up to here every fact is asked for: practice in looking up, before the long ones
WORDS = 272  # 8 times a top-k of 32, and half of one more
QUESTIONS = (8, 12)
FAR_WORDS = 64  # most questions ask for a fact at least so far before their answer
NEAR_SHARE = 0.1
_FACT_WORDS, _QUESTION_WORDS = 4, 5


Fact = tuple[str, str, str]  # subject, relation, object


def make_document(name: str, known: Sequence[Fact], rng: random.Random, split: Split, words: int) -> Document:
    """A document of `words` words (up to 3 fewer; a short one up to 8) about some of the `known` facts of a family.

    A document of at most SHORT_WORDS words asks for each of its facts once, and its facts share subjects: neither the
    subject nor the relation alone finds an answer.
    Raises ValueError when `words` leaves no room for far facts, or asks for more facts than are known.
    """
    if 2 * (_FACT_WORDS + _QUESTION_WORDS) <= words <= SHORT_WORDS:
        facts = _few_subjects(known, words // (_FACT_WORDS + _QUESTION_WORDS), rng)
        return _document(facts, rng.sample(range(len(facts)), len(facts)), split)
    asked = rng.randint(*QUESTIONS)
    count = (words - asked * _QUESTION_WORDS) // _FACT_WORDS
    if not FAR_WORDS // _FACT_WORDS + QUESTIONS[1] <= count <= len(known):
        least = FAR_WORDS + QUESTIONS[1] * (_FACT_WORDS + _QUESTION_WORDS)
        most, short = len(known) * _FACT_WORDS, 2 * (_FACT_WORDS + _QUESTION_WORDS)
        raise ValueError(f"a {name} document has {short} to {SHORT_WORDS} or {least} to {most} words, got {words}")
    facts = rng.sample(list(known), count)
    far = [i for i in range(count) if (count - i) * _FACT_WORDS >= FAR_WORDS]
    near = [i for i in range(count) if i not in far]
    near_asked = sum(rng.random() < NEAR_SHARE for _ in range(asked))
    chosen = rng.sample(far, asked - near_asked) + rng.sample(near, near_asked)
    rng.shuffle(chosen)
    return _document(facts, chosen, split)


def _few_subjects(known: Sequence[Fact], count: int, rng: random.Random) -> list[Fact]:
    """`count` facts, all that is known of as few subjects as hold them, in random order."""
    subjects = sorted({subject for subject, _, _ in known})
    rng.shuffle(subjects)
    place = {subject: index for index, subject in enumerate(subjects)}
    facts = sorted(known, key=lambda fact: place[fact[0]])[:count]
    rng.shuffle(facts)
    return facts


def _document(facts: Sequence[Fact], chosen: list[int], split: Split) -> Document:
    """The facts as sentences, then the questions `chosen` (indices of facts) in order."""
    text = [word for fact in facts for word in (*fact, ".")]
    questions = []
    for i in chosen:
        subject, relation, answer = facts[i]
        start = len(text) + 3
        evidence = [i * _FACT_WORDS, i * _FACT_WORDS + 1, i * _FACT_WORDS + 2]
        questions.append(Question(answer_start=start, answer_end=start + 1, evidence=evidence))
        text += ["?", subject, relation, answer, "."]
    return Document(id=digest(text), words=text, questions=questions, split=split)
