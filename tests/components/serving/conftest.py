"""A real server in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
import torch

from components.runtime import processes
from model.checkpoint import load_model
from model.config import ModelConfig
from model.context import PackedContext
from model.transformer import Transformer
from tests.components.serving.served import WORDS, save_checkpoint, start_server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model: what it writes is nonsense, but always the same nonsense."""
    config = ModelConfig.preset("micro", vocab_size=len(WORDS))
    return save_checkpoint(Transformer(config).initialise(7), tmp_path_factory.mktemp("served") / "micro")


@pytest.fixture(scope="session")
def server_url(checkpoint: Path) -> Iterator[str]:
    process, url = start_server(
        str(checkpoint), "--max-sequences", "4", "--max-waiting", "2", "--max-sequence-tokens", "4096"
    )
    yield url
    processes.stop(process)


@pytest.fixture
def client(server_url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=server_url, api_key="none", max_retries=0, timeout=30)


@pytest.fixture(scope="session")
def next_token_oracle(checkpoint: Path) -> Callable[[list[str]], torch.Tensor]:
    """Logits of a full forward after these words: what the server must sample from."""
    model = load_model(checkpoint)

    @torch.no_grad()
    def logits(words: list[str]) -> torch.Tensor:
        ids = torch.tensor([WORDS.index(word) for word in words])
        return model(ids, PackedContext.from_lengths([len(words)]))[-1]

    return logits
