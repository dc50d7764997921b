"""What benchmark and ablations share: a task set and a checkpoint from folders."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from components.environments.protocol import Environment
from components.post_training.config import PostTrainingConfig
from components.post_training.run import check_words, chosen_tasks, installed
from components.runtime.contracts import TaskRecord
from components.runtime.errors import InputError
from components.runtime.task_set import read_vocabulary
from model import Transformer
from model.checkpoint import CheckpointError, load_model, load_tokenizer

PACKAGES = ("torch", "ray", "numpy")  # whose versions a result file names


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
