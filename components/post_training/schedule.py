"""When prompts are issued and when the learner takes a batch.

A schedule is a generator of batches, from the step `start` on. It is asked for the next one after the learner trained
on the last and published its weights; `version` then gives the number of those.

- synchronous: a batch is played with the newest weights, while the learner waits.
- one_step_off: the next batch is issued before this one is trained on, so that its tokens are one version old. Which
  weights play what does not depend on timing.
- asynchronous: groups are issued as long as few enough are under way, and trained on in the order in which they come
  back; those with tokens that are too old are dropped.
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


def synchronous(
    config: PostTrainingConfig, pool: Pool, flow: Flow, version: Callable[[], int], start: int = 0
) -> Iterator[Batch]:
    """Play a batch, refill what teaches nothing, hand it over."""
    for _ in range(start, config.steps):
        pool.submit(flow.issue(config.prompts, version()))
        gather(config, pool, flow, version())
        yield flow.batch(version())


def one_step_off(
    config: PostTrainingConfig, pool: Pool, flow: Flow, version: Callable[[], int], start: int = 0
) -> Iterator[Batch]:
    """Hand over a batch while the next is played."""
    pool.submit(flow.issue(config.prompts, version()))
    for step in range(start, config.steps):
        gather(config, pool, flow, version())
        batch = flow.batch(version())
        if step + 1 < config.steps:
            pool.submit(flow.issue(config.prompts, version()))
        yield batch


def asynchronous(
    config: PostTrainingConfig, pool: Pool, flow: Flow, version: Callable[[], int], start: int = 0
) -> Iterator[Batch]:
    """Keep the workers busy; a batch is what came back.

    It is complete with `prompts` groups to learn from, or when (1 + refills) * prompts groups came back.
    """
    # with this many under way at most, a batch is trained on before more than `staleness` others changed the weights
    limit = config.groups_in_flight or config.prompts * (config.staleness + 1)
    out = 0
    for step in range(start, config.steps):
        rest = config.prompts * (config.steps - step)  # more than these the run cannot use
        out += _issue(pool, flow, min(limit, rest) - out, version())
        while not _complete(config, flow, version()):
            if out == 0:
                out += _issue(pool, flow, min(limit, rest), version())
            played = pool.collect()
            out -= len(played)
            flow.accept(played)
        yield flow.batch(version())


def _complete(config: PostTrainingConfig, flow: Flow, version: int) -> bool:
    flow.drop_older(version - config.staleness)
    return len(flow.useful) >= config.prompts or len(flow.played) >= config.prompts * (1 + config.refills)


def _issue(pool: Pool, flow: Flow, room: int, version: int) -> int:
    """Issue groups into the room that those which wait to be trained on leave; how many."""
    count = max(0, room - len(flow.useful))
    if count:
        pool.submit(flow.issue(count, version))
    return count


SCHEDULES = {"synchronous": synchronous, "one_step_off": one_step_off, "asynchronous": asynchronous}


def gather(config: PostTrainingConfig, pool: Pool, flow: Flow, version: int) -> None:
    """Wait for all that is out; then new prompts take the place of groups that teach nothing, for some rounds."""
    for round_ in range(config.refills + 1):
        played: list[PlayedGroup] = []
        while more := pool.collect():
            played += more
        flow.accept(played)
        missing = config.prompts - len(flow.useful)
        if missing <= 0 or round_ == config.refills:
            return
        pool.submit(flow.issue(missing, version))
