"""tokenizer.json and its companions, as stock `transformers` reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from model.checkpoint.hugging_face import CheckpointError

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def word_tokenizer(special_words: Sequence[str], words: Sequence[str], unknown: str) -> Tokenizer:
    """A closed-vocabulary tokenizer: words are separated by spaces, one token each, special words first.

    Raises ValueError for a word that stands twice or holds a space.
    """
    everything = [*special_words, *words]
    doubled = sorted({word for word in everything if everything.count(word) > 1})
    if doubled:
        raise ValueError(f"words stand twice in the vocabulary: {', '.join(doubled[:5])}")
    spaced = [word for word in everything if word.split() != [word]]
    if spaced:
        raise ValueError(f"a word must not be empty or hold white space: {spaced[0]!r}")
    vocabulary = {word: index for index, word in enumerate(everything)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def save_tokenizer(
    tokenizer: Tokenizer, directory: Path | str, *, chat_template: str, bos: str, eos: str, pad: str, unknown: str
) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unknown,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (directory / "chat_template.jinja").write_text(chat_template)


def copy_tokenizer(source: Path | str, target: Path | str) -> None:
    """Copy the tokenizer's files from one checkpoint directory to another, unchanged."""
    for name in FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(target) / name)


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint. Raises CheckpointError when tokenizer.json is missing or damaged."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"no tokenizer at {path}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{path} is damaged: {error}") from None
