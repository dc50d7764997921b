"""What the tests of the server share: a checkpoint with the words of a real environment, a server in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from components.environments.chat_format import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_WORDS, UNKNOWN
from components.environments.kg_query import KnowledgeGraphQuery
from components.runtime import processes
from model.checkpoint import save_model, save_tokenizer, word_tokenizer
from model.transformer import Transformer

WORDS = [*SPECIAL_WORDS, *KnowledgeGraphQuery().vocabulary()]


def save_checkpoint(model: Transformer, directory: Path) -> Path:
    save_model(model, directory)
    tokenizer = word_tokenizer(SPECIAL_WORDS, KnowledgeGraphQuery().vocabulary(), UNKNOWN)
    save_tokenizer(tokenizer, directory, chat_template=CHAT_TEMPLATE, bos=BOS, eos=END, pad=PAD, unknown=UNKNOWN)
    return directory


def start_server(model: str, *options: str, environment: dict[str, str] | None = None) -> tuple[subprocess.Popen, str]:
    """Start `python -m components.serving`; returns the process and its URL once it says that it listens."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    process = processes.start(
        [sys.executable, "-m", "components.serving", "--model", model, "--port", "0", *options],
        environment=variables,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert " on http" in line, line
    return process, line.split(" on ")[1].strip()
