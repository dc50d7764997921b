"""Finds the checkpoint that is to be served and builds the engine on it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from components.environments.chat_format import END, SPECIAL_WORDS
from components.runtime import artifacts
from components.runtime.errors import InputError
from components.runtime.registry import SCHEME, Registry
from components.runtime.settings import Settings
from model.checkpoint import CheckpointError, load_model, load_tokenizer
from model.engine import Engine
from model.transformer import Transformer


@dataclass(frozen=True)
class Served:
    """A checkpoint in memory: network, tokenizer, vocabulary by token id, and the names that clients know it by."""

    model: Transformer
    tokenizer: Tokenizer
    words: list[str]
    name: str
    fingerprint: str


def locate(model: str, settings: Settings, digest: str = "") -> tuple[Path, str, str]:
    """Local directory, served name and fingerprint of `model`: a directory, or models:/NAME@ALIAS in the registry.

    `digest`: the sha256 that its manifest must have; empty: any. Raises InputError when there is no such checkpoint, it
    is another than `digest` names, or the copy that the store gives is damaged.
    """
    if model.startswith(SCHEME):
        version = Registry(settings).resolve(model)
        if digest and digest != version.pointer.sha256:
            raise InputError(
                f"{model} is the checkpoint {version.pointer.sha256[:12]} ({version.pointer.uri}), but {digest[:12]} "
                "was asked for: the registry is not the one that the release was made from, or was changed since; "
                "`sparseline release` writes version and digest together"
            )
        directory = artifacts.fetch(settings.open_store(), version.pointer, settings.runs / "served")
        return directory, version.name, version.pointer.sha256[:12]
    directory = Path(model).expanduser()
    if not directory.is_dir():
        raise InputError(f"{model!r} is no directory; give a checkpoint's folder or models:/NAME@champion")
    told = [path for name in (artifacts.MANIFEST, "config.json") if (path := directory / name).is_file()]
    found = artifacts.file_sha256(told[0]) if told else ""
    if digest and digest != found:
        raise InputError(
            f"{directory} is the checkpoint {found[:12] or 'of no manifest'}, but {digest[:12]} was asked for"
        )
    return directory, directory.resolve().name, found[:12]


def load(directory: Path, name: str, fingerprint: str, *, dtype: torch.dtype, device: str) -> Served:
    """Network and tokenizer of a checkpoint directory, on `device`.

    Raises InputError when it is damaged, or its tokenizer lacks the words of the chat format.
    """
    try:
        tokenizer = load_tokenizer(directory)
        network = load_model(directory, dtype=dtype).to(device)
    except CheckpointError as error:
        raise InputError(f"the checkpoint in {directory} cannot be served: {error}") from error
    missing = [word for word in SPECIAL_WORDS if tokenizer.token_to_id(word) is None]
    if missing:
        raise InputError(f"the tokenizer of {directory} lacks the chat format's words: {', '.join(missing)}")
    # rows of the network beyond the tokenizer's words are padding; they are never a known word
    size = network.config.vocab_size
    words = [tokenizer.id_to_token(i) or f"<|unused-{i}|>" for i in range(size)]
    return Served(network, tokenizer, words, name, fingerprint)


def make_engine(served: Served, *, max_sequences: int, max_sequence_tokens: int) -> Engine:
    """The engine of a server: no training records, prompts fed in pieces between other requests' tokens."""
    return Engine(
        served.model,
        stop_token_id=served.words.index(END),
        max_sequences=max_sequences,
        max_sequence_tokens=min(max_sequence_tokens, served.model.config.max_position_embeddings),
        step_tokens=1024,
        record=False,
    )
