"""What benchmark and ablations share: a task set and a checkpoint from folders, and the frame of a result file."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from tokenizers import Tokenizer

from components.environments.protocol import Environment
from components.post_training.config import PostTrainingConfig
from components.post_training.run import check_words, chosen_tasks, installed
from components.runtime.contracts import TaskRecord
from components.runtime.errors import InputError
from components.runtime.task_set import read_vocabulary
from model import Transformer
from model.checkpoint import CheckpointError, load_model, load_tokenizer


class Material:
    """A task set and a checkpoint. Raises InputError when they do not fit together."""

    def __init__(self, tasks: Path, checkpoint: Path, config: PostTrainingConfig) -> None:
        self.checkpoint = checkpoint
        self.tasks: list[TaskRecord]
        self.tasks, self.validation = chosen_tasks(tasks, config)
        try:
            self.tokenizer: Tokenizer = load_tokenizer(checkpoint)
            load_model(checkpoint)
        except CheckpointError as error:
            raise InputError(f"checkpoint {checkpoint}: {error}") from error
        check_words(read_vocabulary(tasks), self.tokenizer, str(checkpoint))
        everything = [*self.tasks, *self.validation]
        self.environments: dict[str, Environment] = installed({task.environment for task in everything})
        self.longest = max(task.limits.tokens for task in everything)

    def model(self) -> Transformer:
        """The checkpoint's network, anew."""
        return load_model(self.checkpoint)


def frame(command: str) -> dict[str, Any]:
    """Hardware, versions, date and command of a result file."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    memory = round(psutil.virtual_memory().total / 1e9, 1)
    return {
        "hardware": {"cpu": model, "cores": len(os.sched_getaffinity(0)), "memory_gb": memory, "gpu": None},
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "ray", "numpy")},
        },
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "command": command,
    }
