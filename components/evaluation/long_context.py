"""What the sparse attention loses on long documents, and whether the lightning indexer finds the evidence.

The same weights read held-out documents with every key (dense), with the indexer's top-k (sparse), and with as many
keys chosen without looking at them: the most recent ones (window), or random ones.
Shape suffixes: T tokens (all documents of a batch, packed), K selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from components.environments.chat_format import BOS
from components.evaluation.compare import Bootstrap
from components.evaluation.report import CrossEntropy, DepthBin, IndexerRecall
from components.runtime.contracts import Document
from components.runtime.errors import InputError
from model.context import PackedContext, Selection
from model.transformer import Transformer

KINDS: tuple[Selection, ...] = ("dense", "sparse", "window", "random")


@dataclass(frozen=True)
class Losses:
    """Cross-entropy (nats) of every predicted word of all documents, in order, and whose word it is."""

    nats: np.ndarray
    document: np.ndarray
    is_answer: np.ndarray


def encode(document: Document, tokenizer: Tokenizer) -> torch.Tensor:
    """Token ids, int64 [1 + words]: word w is token w + 1, behind <|bos|>. Raises InputError for an unknown word."""
    ids = [tokenizer.token_to_id(word) for word in [BOS, *document.words]]
    if None in ids:
        word = [BOS, *document.words][ids.index(None)]
        raise InputError(f"the checkpoint's tokenizer does not know the word {word!r} of document {document.id[:12]}")
    return torch.tensor(ids)


def _batches(documents: Sequence[Document], size: int) -> Iterator[tuple[int, Sequence[Document]]]:
    for start in range(0, len(documents), size):
        yield start, documents[start : start + size]


@torch.inference_mode()
def losses(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    kind: Selection,
    *,
    batch: int,
    seed: int,
    tick: Callable[[int], None] = lambda documents: None,
) -> Losses:
    """Cross-entropy of the documents' words under the attention `kind`."""
    nats, owner, is_answer = [], [], []
    before = model.attention_mode
    model.attention_mode = kind
    try:
        for start, part in _batches(documents, batch):
            ids = [encode(document, tokenizer) for document in part]
            context = PackedContext.from_lengths([len(tokens) for tokens in ids])
            context.random_seed = seed + start
            logprob_TV = model(torch.cat(ids), context).float().log_softmax(dim=-1)
            row = 0
            for index, (document, tokens) in enumerate(zip(part, ids, strict=True)):
                predictions = logprob_TV[row : row + len(tokens) - 1]
                nats.append(-predictions.gather(1, tokens[1:, None]).squeeze(1).numpy())
                answers = np.zeros(len(tokens) - 1, dtype=bool)  # entry w: word w of the document
                for question in document.questions:
                    answers[question.answer_start : question.answer_end] = True
                is_answer.append(answers)
                owner.append(np.full(len(tokens) - 1, start + index))
                row += len(tokens)
            tick(len(part))
    finally:
        model.attention_mode = before
    return Losses(np.concatenate(nats).astype(np.float64), np.concatenate(owner), np.concatenate(is_answer))


def cross_entropy(by_kind: dict[Selection, Losses], bootstrap: Bootstrap, *, answers_only: bool) -> CrossEntropy:
    """Mean cross-entropy of each kind and its gap to dense; whole documents are resampled for the gaps."""
    keep = by_kind["dense"].is_answer if answers_only else np.ones_like(by_kind["dense"].is_answer)
    nats = {kind: found.nats[keep] for kind, found in by_kind.items()}
    owner = [str(number) for number in by_kind["dense"].document[keep]]
    gaps = {
        kind: bootstrap.over((nats[kind] - nats["dense"]).tolist(), owner).model_copy(update={"n": len(set(owner))})
        for kind in ("sparse", "window", "random")
    }
    means = {str(kind): float(values.mean()) for kind, values in nats.items()}
    return CrossEntropy(
        **means,
        gap=gaps["sparse"],
        window_gap=gaps["window"],
        random_gap=gaps["random"],
        tokens=int(keep.sum()),
    )


@dataclass(frozen=True)
class Found:
    """One question: words between the predicting position and the nearest evidence word, and the recall by layer."""

    document: int
    distance: int
    all_words: list[float]
    answer_word: list[float]


@torch.inference_mode()
def evidence_found(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    *,
    batch: int,
    tick: Callable[[int], None] = lambda documents: None,
) -> list[Found]:
    """For every question, the share of its evidence among the keys selected where its first answer token is predicted.

    answer_word counts only the evidence words that the answer repeats: what a reader has to copy.
    """
    found = []
    for start, part in _batches(documents, batch):
        ids = [encode(document, tokenizer) for document in part]
        context = PackedContext.from_lengths([len(tokens) for tokens in ids])
        context.record_selections = True
        model.hidden(torch.cat(ids), context)
        first_row = 0
        for index, (document, tokens) in enumerate(zip(part, ids, strict=True)):
            for question in document.questions:
                # the answer's first word is token answer_start + 1; the position before it predicts it
                position = question.answer_start
                answer = set(document.words[question.answer_start : question.answer_end])
                evidence = [word + 1 for word in question.evidence]
                copied = [word + 1 for word in question.evidence if document.words[word] in answer]
                chosen = [
                    {int(row) - first_row for row in rows_TK[first_row + position] if row >= 0}
                    for rows_TK in context.selections
                ]
                found.append(
                    Found(
                        document=start + index,
                        distance=position - max(evidence),
                        all_words=[_share(evidence, keys) for keys in chosen],
                        answer_word=[_share(copied, keys) for keys in chosen],
                    )
                )
            first_row += len(tokens)
        tick(len(part))
    return found


def _share(wanted: Sequence[int], keys: set[int]) -> float:
    return sum(position in keys for position in wanted) / len(wanted) if wanted else float("nan")


def indexer_recall(
    validation: Sequence[Found],
    test: Sequence[Found],
    bootstrap: Bootstrap,
    *,
    top_k: int,
) -> IndexerRecall:
    """Recall of evidence at least 2 * top_k back, at the layer that is best on the validation documents.

    Raises InputError when no question has its evidence so far back, or no answer repeats a word of its evidence.
    """
    far = {
        split: [one for one in found if one.distance >= 2 * top_k]
        for split, found in (("validation", validation), ("test", test))
    }
    for split, questions in far.items():
        if len({one.document for one in questions}) < 2:
            raise InputError(
                f"fewer than two {split} documents ask for evidence {2 * top_k} words back (2 * top-k); "
                "synthesise longer documents, or more of them"
            )
    layers = {
        split: {
            measure: np.array([getattr(one, measure) for one in questions]).mean(axis=0)
            for measure in ("all_words", "answer_word")
        }
        for split, questions in far.items()
    }
    if not all(np.isfinite(values).all() for by_measure in layers.values() for values in by_measure.values()):
        raise InputError("a question's answer repeats no word of its evidence; correct Question.evidence in synthesis")
    best = {measure: int(values.argmax()) for measure, values in layers["validation"].items()}
    intervals = {
        measure: bootstrap.over(
            [getattr(one, measure)[layer] for one in far["test"]], [str(one.document) for one in far["test"]]
        )
        for measure, layer in best.items()
    }
    return IndexerRecall(
        layer=best["all_words"],
        all_words=intervals["all_words"],
        answer_layer=best["answer_word"],
        answer_word=intervals["answer_word"],
        by_layer={measure: values.tolist() for measure, values in layers["test"].items()},
        validation_by_layer={measure: values.tolist() for measure, values in layers["validation"].items()},
        depth=_depth_bins(test, best, top_k),
    )


def _depth_bins(questions: Sequence[Found], layer: dict[str, int], width: int) -> list[DepthBin]:
    """Recall by distance in bins of top-k words; empty bins are left out."""
    bins: dict[int, list[Found]] = {}
    for one in questions:
        bins.setdefault(one.distance // width, []).append(one)
    return [
        DepthBin(
            low=number * width,
            high=(number + 1) * width,
            all_words=float(np.mean([one.all_words[layer["all_words"]] for one in inside])),
            answer_word=float(np.mean([one.answer_word[layer["answer_word"]] for one in inside])),
            n=len(inside),
        )
        for number, inside in sorted(bins.items())
    ]
