"""Cross-entropy by kind of attention and indexer recall, against what is known without them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from components.environments.chat_format import BOS, SPECIAL_WORDS, UNKNOWN
from components.environments.kg_query import KnowledgeGraphQuery
from components.evaluation.compare import Bootstrap
from components.evaluation.long_context import (
    KINDS,
    Found,
    Losses,
    cross_entropy,
    encode,
    evidence_found,
    indexer_recall,
    losses,
)
from components.runtime.contracts import Document, Question
from components.runtime.errors import InputError
from model.checkpoint import word_tokenizer
from model.config import ModelConfig
from model.context import PackedContext
from model.transformer import Transformer

VOCABULARY = KnowledgeGraphQuery().vocabulary()
TOKENIZER = word_tokenizer(SPECIAL_WORDS, VOCABULARY, UNKNOWN)
BOOTSTRAP = Bootstrap(resamples=500, confidence=0.95, seed=0)


def network(top_k: int) -> Transformer:
    config = ModelConfig.preset("micro", vocab_size=len(SPECIAL_WORDS) + len(VOCABULARY), index_topk=top_k)
    return Transformer(config).initialise(3)


def document(words: int, seed: int) -> Document:
    """Random words; the last one is the answer, and its evidence is any three words before."""
    rng = random.Random(seed)
    text = [rng.choice(VOCABULARY) for _ in range(words)]
    evidence = sorted(rng.sample(range(words - 1), 3))
    text[-1] = text[evidence[-1]]
    question = Question(answer_start=words - 1, answer_end=words, evidence=evidence)
    return Document(id=str(seed), words=text, questions=[question], split="test")


DOCUMENTS = [document(words, seed) for seed, words in enumerate((23, 41, 30, 37, 28))]


@torch.no_grad()
def test_losses_of_a_packed_batch_are_those_of_each_document_alone() -> None:
    model = network(top_k=8)
    for kind in ("sparse", "dense", "window"):
        found = losses(model, TOKENIZER, DOCUMENTS, kind, batch=3, seed=0)
        model.attention_mode = kind
        for index, one in enumerate(DOCUMENTS):
            ids = torch.tensor([TOKENIZER.token_to_id(word) for word in [BOS, *one.words]])
            logits = model(ids, PackedContext.from_lengths([len(ids)]))
            expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
            mine = found.document == index
            np.testing.assert_allclose(found.nats[mine], expected.numpy(), atol=1e-5)
            # the only answer is the last word
            assert found.is_answer[mine].tolist() == [False] * (len(one.words) - 1) + [True]
        model.attention_mode = "sparse"


def test_the_attention_of_the_model_is_left_as_it_was() -> None:
    model = network(top_k=8)
    losses(model, TOKENIZER, DOCUMENTS[:1], "window", batch=1, seed=0)
    assert model.attention_mode == "sparse"


def test_a_top_k_beyond_the_document_makes_every_kind_dense_and_finds_everything() -> None:
    model = network(top_k=64)
    by_kind = {kind: losses(model, TOKENIZER, DOCUMENTS, kind, batch=5, seed=1) for kind in KINDS}
    for kind in KINDS:
        np.testing.assert_allclose(by_kind[kind].nats, by_kind["dense"].nats, atol=1e-5)
    for one in evidence_found(model, TOKENIZER, DOCUMENTS, batch=2):
        assert one.all_words == one.answer_word == [1.0, 1.0]


@pytest.mark.parametrize("top_k", [1, 7, 16])
def test_recall_of_a_recency_window_is_known_exactly(top_k: int) -> None:
    """Position p sees p - k + 1 ... p. An error of one anywhere between words, tokens and rows shows here."""
    model = network(top_k)
    model.attention_mode = "window"
    found = evidence_found(model, TOKENIZER, DOCUMENTS, batch=2)
    assert [one.document for one in found] == list(range(len(DOCUMENTS)))
    for one, doc in zip(found, DOCUMENTS, strict=True):
        (question,) = doc.questions
        # in words: the answer is the last word, predicted by the one before it, `back` words after the evidence
        back = [len(doc.words) - 2 - word for word in question.evidence]
        inside = [distance < top_k for distance in back]
        assert one.distance == min(back)
        assert one.all_words == pytest.approx([sum(inside) / 3] * 2)
        copied = [i for i, w in zip(inside, question.evidence, strict=True) if doc.words[w] == doc.words[-1]]
        assert one.answer_word == pytest.approx([sum(copied) / len(copied)] * 2)


def test_random_selection_is_another_one_in_every_batch() -> None:
    twins = [DOCUMENTS[1], DOCUMENTS[1]]
    found = losses(network(top_k=4), TOKENIZER, twins, "random", batch=1, seed=0)
    assert not np.allclose(found.nats[found.document == 0], found.nats[found.document == 1])


def test_gaps_are_means_over_words_and_n_counts_documents() -> None:
    def made(values: list[float]) -> Losses:
        return Losses(np.array(values), np.array([0, 0, 0, 1]), np.array([False, False, True, True]))

    by_kind = {
        "dense": made([1, 1, 1, 1]),
        "sparse": made([1, 1, 1, 2]),
        "window": made([2, 2, 2, 2]),
        "random": made([1, 1, 5, 5]),
    }
    every = cross_entropy(by_kind, BOOTSTRAP, answers_only=False)  # type: ignore[arg-type]
    assert (every.dense, every.sparse, every.window, every.random) == (1, 1.25, 2, 3)
    assert (every.gap.mean, every.gap.n, every.tokens) == (0.25, 2, 4)
    assert (every.window_gap.low, every.window_gap.high) == (1, 1)
    answers = cross_entropy(by_kind, BOOTSTRAP, answers_only=True)  # type: ignore[arg-type]
    assert (answers.sparse, answers.random, answers.gap.mean, answers.tokens) == (1.5, 5, 0.5, 2)


def test_the_layer_is_chosen_on_validation_and_near_evidence_counts_only_in_the_bins() -> None:
    def question(document: int, distance: int, all_words: list[float], answer_word: list[float]) -> Found:
        return Found(document, distance, all_words, answer_word)

    validation = [question(d, 64, [0.9, 0.1], [0.1, 0.9]) for d in range(3)]
    validation += [question(0, 63, [0.0, 1.0], [1.0, 0.0])] * 50  # nearer than 2 * top_k: must not choose
    test = [question(0, 70, [0.5, 1.0], [0.0, 0.25]), question(1, 100, [1.0, 1.0], [1.0, 0.75])]
    test += [question(1, 5, [0.0, 0.0], [0.5, 0.5])]
    found = indexer_recall(validation, test, BOOTSTRAP, top_k=32)
    assert (found.layer, found.answer_layer) == (0, 1)
    assert (found.all_words.mean, found.answer_word.mean, found.all_words.n) == (0.75, 0.5, 2)
    assert found.by_layer == {"all_words": [0.75, 1.0], "answer_word": [0.5, 0.5]}
    assert [(b.low, b.high, b.all_words, b.answer_word, b.n) for b in found.depth] == [
        (0, 32, 0.0, 0.5, 1),
        (64, 96, 0.5, 0.25, 1),
        (96, 128, 1.0, 0.75, 1),
    ]


def test_too_short_documents_and_unknown_words_are_bad_input() -> None:
    near = [Found(document, 10, [1.0], [1.0]) for document in range(4)]
    with pytest.raises(InputError, match="fewer than two validation documents"):
        indexer_recall(near, near, BOOTSTRAP, top_k=32)
    strange = DOCUMENTS[0].model_copy(update={"words": ["zebra", *DOCUMENTS[0].words[1:]]})
    with pytest.raises(InputError, match="'zebra'"):
        encode(strange, TOKENIZER)
