"""Near-duplicates across splits: a training task that is nearly a held-out one is removed.

Candidates come from MinHash with locality-sensitive hashing (Broder 1997; the library datasketch); every candidate's
Jaccard similarity is then computed exactly. What is compared are shingles of words of the question and of the
reference's calls: what a player reads first and what it has to do. Tool results are left out, since they follow.
"""

from __future__ import annotations

from collections.abc import Sequence

from datasketch import MinHash, MinHashLSH

from components.environments.chat_format import call_words
from components.runtime.contracts import TaskRecord

SHINGLE = 3
_PERMUTATIONS = 128
_CANDIDATE_SLACK = 0.1  # candidates are looked for below the threshold, for MinHash only estimates
NGRAM = 13


def content(task: TaskRecord) -> list[str]:
    """The words of the question and of the reference's calls."""
    words = [word for message in task.messages for word in message.content.split()]
    return [*words, *(word for call in task.solution for word in call_words(call))]


def shingles(words: Sequence[str], size: int = SHINGLE) -> set[str]:
    """All runs of `size` words; the whole, where there are fewer."""
    return {" ".join(words[at : at + size]) for at in range(max(1, len(words) - size + 1))}


def jaccard(one: set[str], other: set[str]) -> float:
    """Shared share of two sets, 0 to 1."""
    return len(one & other) / len(one | other)


def _hash(found: set[str]) -> MinHash:
    made = MinHash(num_perm=_PERMUTATIONS, seed=1)
    made.update_batch([one.encode() for one in sorted(found)])
    return made


def near_duplicates(
    kept: Sequence[TaskRecord], others: Sequence[TaskRecord], threshold: float
) -> list[tuple[str, str, float]]:
    """(id of one of `others`, id of one of `kept`, their Jaccard similarity) wherever it is at least `threshold`.

    One entry for each of `others` that has such a partner: the most similar.
    """
    sets = {task.id: shingles(content(task)) for task in kept}
    index = MinHashLSH(threshold=max(0.1, threshold - _CANDIDATE_SLACK), num_perm=_PERMUTATIONS)
    for identity, found in sets.items():
        index.insert(identity, _hash(found))
    pairs = []
    for task in others:
        mine = shingles(content(task))
        similar = [(jaccard(mine, sets[identity]), identity) for identity in index.query(_hash(mine))]
        best = max(similar, default=(0.0, ""))
        if best[0] >= threshold:
            pairs.append((task.id, best[1], best[0]))
    return pairs


def remove_near_duplicates(tasks: Sequence[TaskRecord], threshold: float) -> tuple[list[TaskRecord], dict[str, int]]:
    """The tasks without those that are nearly one of a split before theirs: test, then validation, then train.

    Returns the rest in the same order, and how many each split lost.
    """
    removed: set[str] = set()
    lost = {}
    before: list[TaskRecord] = []
    for split in ("test", "validation", "train"):
        mine = [task for task in tasks if task.split == split]
        found = {identity for identity, _, _ in near_duplicates(before, mine, threshold)}
        lost[split] = len(found)
        removed |= found
        before += [task for task in mine if task.id not in found]
    return [task for task in tasks if task.id not in removed], lost


def ngram_overlap(tasks: Sequence[TaskRecord], size: int = NGRAM) -> float:
    """Share of the test tasks whose question and calls share a run of `size` words with a training task.

    The contamination measure of GPT-3 (arXiv 2005.14165, appendix C); 0 where there is no test task.
    """
    seen = {run for task in tasks if task.split == "train" for run in _runs(task, size)}
    test = [task for task in tasks if task.split == "test"]
    return sum(not seen.isdisjoint(_runs(task, size)) for task in test) / max(1, len(test))


def _runs(task: TaskRecord, size: int) -> set[str]:
    words = content(task)
    return shingles(words, size) if len(words) >= size else set()
