"""A real server in a process of its own, on a micro checkpoint with the words of a real environment."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch

from components.environments.chat_format import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_WORDS, UNKNOWN
from components.environments.kg_query import KnowledgeGraphQuery
from components.runtime import processes
from model.checkpoint import save_model, save_tokenizer, word_tokenizer
from model.config import ModelConfig
from model.transformer import Transformer

WORDS = [*SPECIAL_WORDS, *KnowledgeGraphQuery().vocabulary()]


def save_checkpoint(model: Transformer, directory: Path) -> Path:
    save_model(model, directory)
    tokenizer = word_tokenizer(SPECIAL_WORDS, KnowledgeGraphQuery().vocabulary(), UNKNOWN)
    save_tokenizer(tokenizer, directory, chat_template=CHAT_TEMPLATE, bos=BOS, eos=END, pad=PAD, unknown=UNKNOWN)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model: what it writes is nonsense, but always the same nonsense."""
    config = ModelConfig.preset("micro", vocab_size=len(WORDS))
    return save_checkpoint(Transformer(config).initialise(7), tmp_path_factory.mktemp("served") / "micro")


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


@pytest.fixture(scope="session")
def server_url(checkpoint: Path) -> Iterator[str]:
    process, url = start_server(str(checkpoint), "--max-sequences", "4", "--max-waiting", "2")
    yield url
    processes.stop(process)


@pytest.fixture
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=server_url, api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="session")
def next_token_oracle(checkpoint: Path) -> Callable[[list[str]], torch.Tensor]:
    """Logits of a full forward after these words: what the server must sample from."""
    from model.checkpoint import load_model
    from model.context import PackedContext

    model = load_model(checkpoint)

    @torch.no_grad()
    def logits(words: list[str]) -> torch.Tensor:
        ids = torch.tensor([WORDS.index(word) for word in words])
        return model(ids, PackedContext.from_lengths([len(words)]))[-1]

    return logits
