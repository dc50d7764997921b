"""When prompts are issued and when the learner takes a batch.

A schedule is a generator of batches. It is asked for the next one after the learner trained on the last and published
its weights. `synchronous`: a batch is played whole with the newest weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptGroup
from components.post_training.flow import Batch, Flow
from components.post_training.worker import PlayedGroup, RolloutWorker


class Pool(Protocol):
    """Who plays prompt groups: this process, or actors."""

    def submit(self, groups: Sequence[PromptGroup]) -> None:
        """Have groups played with the weights that were published last."""
        ...

    def collect(self) -> list[PlayedGroup]:
        """Wait until some of the submitted groups are played, and return them; [] when none is out."""
        ...

    def publish(self, version: int) -> None:
        """From now on groups are played with the learner's weights as they are now."""
        ...


class LocalPool:
    """Plays in this process, when asked for the result."""

    def __init__(self, worker: RolloutWorker) -> None:
        self.worker = worker
        self._waiting: list[PromptGroup] = []

    def submit(self, groups: Sequence[PromptGroup]) -> None:
        self._waiting.extend(groups)

    def collect(self) -> list[PlayedGroup]:
        groups, self._waiting = self._waiting, []
        return self.worker.play(groups) if groups else []

    def publish(self, version: int) -> None:
        self.worker.load(version)


def synchronous(config: PostTrainingConfig, pool: Pool, flow: Flow, version: Callable[[], int]) -> Iterator[Batch]:
    """Play a batch, refill what teaches nothing, hand it over."""
    for _ in range(config.steps):
        pool.submit(flow.issue(config.prompts, version()))
        gather(config, pool, flow, version())
        yield flow.batch(version())


def gather(config: PostTrainingConfig, pool: Pool, flow: Flow, version: int) -> None:
    """Wait for all that is out; then new prompts take the place of groups that teach nothing, for some rounds."""
    for round_ in range(config.refills + 1):
        while played := pool.collect():
            flow.accept(played)
        missing = config.prompts - len(flow.useful)
        if missing <= 0 or round_ == config.refills:
            return
        pool.submit(flow.issue(missing, version))
