"""What the tests of the server share: a checkpoint with the words of a real environment, a server in a process."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import torch

from components.environments.chat_format import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_WORDS, UNKNOWN, conversation_words
from components.environments.kg_query import KnowledgeGraphQuery
from components.runtime import processes
from components.runtime.contracts import TaskRecord
from model.checkpoint import save_model, save_tokenizer, word_tokenizer
from model.config import ModelConfig
from model.context import PackedContext
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


def learn_by_heart(tasks: list[TaskRecord], steps: int = 150) -> Transformer:
    """A micro model that has memorised the careful teacher's play of these tasks."""
    ids, written, lengths = [], [], []
    for task in tasks:
        demonstration = KnowledgeGraphQuery().play(task, "careful", random.Random(0))
        words, by_assistant = conversation_words(demonstration.messages, task.tools)
        ids += [WORDS.index(word) for word in words]
        written += by_assistant
        lengths.append(len(words))
    ids_T = torch.tensor(ids)
    targets = torch.tensor(written).nonzero().flatten()
    model = Transformer(ModelConfig.preset("micro", vocab_size=len(WORDS))).initialise(0)
    optimiser = torch.optim.Adam(model.network_parameters(), lr=4e-3)
    for _ in range(steps):
        logits_TV = model(ids_T, PackedContext.from_lengths(lengths))
        loss = torch.nn.functional.cross_entropy(logits_TV[targets - 1], ids_T[targets])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model
