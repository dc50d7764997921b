"""Records of the task set -> token ids and loss weights, and the order in which they are seen.

A batch holds sequences of one kind (demonstrations or documents).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.environments.chat_format import BOS, UNKNOWN, conversation_words
from components.runtime.contracts import Demonstration, Document
from components.runtime.errors import InputError


@dataclass
class Example:
    """token_ids: int64 [L]; weights: fp32 [L], weight in the loss of predicting the token at that place."""

    token_ids: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Totals:
    """Sums over a batch's targets: loss weights, tokens of weight 1 (what was written, answers), all tokens."""

    weight: float
    answer_tokens: int
    tokens: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Totals:
        weights_T = torch.cat([example.weights[1:] for example in examples])
        return cls(float(weights_T.sum()) or 1.0, int((weights_T == 1).sum()) or 1, len(weights_T))


@dataclass
class Batch:
    """Packed examples. inputs/targets: int64 [T]; weights: fp32 [T]; lengths: tokens of each sequence."""

    inputs_T: torch.Tensor
    targets_T: torch.Tensor
    weights_T: torch.Tensor
    lengths: list[int]


def encode(words: Sequence[str], ids: dict[str, int], where: str) -> torch.Tensor:
    """Token ids. Raises InputError that names a word which the tokenizer does not know."""
    try:
        return torch.tensor([ids[word] for word in words])
    except KeyError as error:
        raise InputError(
            f"{where}: the checkpoint's tokenizer does not know the word {error.args[0]!r}; "
            "use a base checkpoint that was trained on this vocabulary, or none"
        ) from None


def demonstration_example(demonstration: Demonstration, ids: dict[str, int]) -> Example:
    """What the assistant wrote has weight 1, what it was told has weight 0."""
    words, written = conversation_words(demonstration.messages, demonstration.tools)
    return Example(encode(words, ids, f"demonstration of {demonstration.task}"), torch.tensor(written).float())


def document_example(document: Document, ids: dict[str, int], filler_weight: float) -> Example:
    token_ids = encode([BOS, *document.words], ids, f"document {document.id}")
    weights = torch.full((len(token_ids),), filler_weight)
    for question in document.questions:
        weights[question.answer_start + 1 : question.answer_end + 1] = 1.0
    return Example(token_ids, weights)


def save_examples(examples: Mapping[str, Sequence[Example]], path: Path) -> None:
    """Lists of examples, by name, in one file: the other ranks need not read and tokenise the records again."""
    torch.save(
        {
            name: {
                "token_ids": torch.cat([example.token_ids for example in found]),
                "weights": torch.cat([example.weights for example in found]),
                "lengths": [len(example.token_ids) for example in found],
            }
            for name, found in examples.items()
            if found
        },
        path,
    )


def load_examples(path: Path) -> dict[str, list[Example]]:
    """What `save_examples` wrote; a name without examples is left out."""
    return {
        name: [
            Example(*parts)
            for parts in zip(
                stored["token_ids"].split(stored["lengths"]), stored["weights"].split(stored["lengths"]), strict=True
            )
        ]
        for name, stored in torch.load(path, weights_only=True).items()
    }


def pack(examples: Sequence[Example]) -> Batch:
    """Each example becomes a sequence of its tokens but the last, which is only a target."""
    return Batch(
        inputs_T=torch.cat([example.token_ids[:-1] for example in examples]),
        targets_T=torch.cat([example.token_ids[1:] for example in examples]),
        weights_T=torch.cat([example.weights[1:] for example in examples]),
        lengths=[len(example.token_ids) - 1 for example in examples],
    )


class Stream:
    """Endless batches of about `tokens` tokens: shuffled epochs, without regard to length or family.

    Batches of neighbours by length would need no padding, but their gradients depend on which lengths, and hence on
    which families, come together: after as many steps the loss is higher, most of all that of documents.
    With a curriculum, only the shortest share of the examples is drawn from at first (see `next`).
    """

    def __init__(self, examples: Sequence[Example], tokens: int, generator: torch.Generator) -> None:
        self.examples, self.tokens, self.generator = sorted(examples, key=_length), tokens, generator
        self._parts: list[list[Example]] = []
        self._share = 0.0
        self._epoch_start = generator.get_state()
        self._taken = 0

    def next(self, share: float = 1.0) -> list[Example]:
        """The next batch's examples, drawn from the shortest `share` (0, 1] of all."""
        if not self._parts or share > self._share:
            self._begin_epoch(share)
        self._taken += 1
        return self._parts.pop()

    def _begin_epoch(self, share: float) -> None:
        self._share, self._taken, self._epoch_start = share, 0, self.generator.get_state()
        self._parts = self._epoch(self.examples[: max(1, round(share * len(self.examples)))])

    def state(self) -> dict[str, Any]:
        """Where the stream is: enough to draw the same batches from here on (see `load_state`)."""
        return {"share": self._share, "taken": self._taken, "epoch_start": self._epoch_start}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken. The generator is left as it was after that epoch was shuffled."""
        if state["share"]:
            self.generator.set_state(state["epoch_start"])
            self._begin_epoch(state["share"])
            del self._parts[len(self._parts) - state["taken"] :]
            self._taken = state["taken"]

    def _epoch(self, examples: Sequence[Example]) -> list[list[Example]]:
        parts: list[list[Example]] = [[]]
        used = 0
        for index in torch.randperm(len(examples), generator=self.generator).tolist():
            length = _length(examples[index])
            if parts[-1] and used + length > self.tokens:
                parts.append([])
                used = 0
            parts[-1].append(examples[index])
            used += length
        return [sorted(part, key=_length) for part in parts]  # what ranks take in turn costs about the same


def _length(example: Example) -> int:
    return len(example.token_ids) - 1


def known_words(vocabulary: dict[str, int]) -> dict[str, int]:
    """The vocabulary without the word for unknown ones, which no record may need."""
    return {word: index for word, index in vocabulary.items() if word != UNKNOWN}
