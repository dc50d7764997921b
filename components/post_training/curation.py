"""Which tasks are played: prompts balanced over the families, each task once before any is played again."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.runtime.contracts import TaskRecord


@dataclass(frozen=True)
class PromptGroup:
    """A task to be played once for each seed. `id` counts the groups of a run."""

    id: int
    task: TaskRecord
    seeds: tuple[int, ...]


class PromptSampler:
    """An endless, seeded stream of prompt groups. Families take turns, in an order drawn anew each round."""

    def __init__(self, tasks: Sequence[TaskRecord], group_size: int, seed: str) -> None:
        if not tasks:
            raise ValueError("there are no tasks to sample from")
        self._seed, self._group_size = seed, group_size
        self._rng = random.Random(f"{seed}/prompts")
        self._tasks = by_family(tasks)
        self._left: dict[str, deque[TaskRecord]] = {family: deque() for family in self._tasks}
        self._round: deque[str] = deque()
        self._next = 0
        self._lost: deque[PromptGroup] = deque()

    def take(self, count: int) -> list[PromptGroup]:
        """The next `count` groups, lost ones first."""
        return [self._lost.popleft() if self._lost else self._group() for _ in range(count)]

    def again(self, lost: Mapping[int, str]) -> None:
        """Hand out anew these groups (their tasks' ids by number), which an earlier try handed out in vain."""
        by_id = {task.id: task for tasks in self._tasks.values() for task in tasks}
        self._lost.extend(PromptGroup(number, by_id[task], self._seeds(number)) for number, task in lost.items())

    def state(self) -> dict[str, Any]:
        """Where the stream is, in plain values. Lost groups are not among them: the ledger knows those."""
        left = {family: [task.id for task in tasks] for family, tasks in self._left.items()}
        return {"rng": self._rng.getstate(), "left": left, "round": list(self._round), "next": self._next}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go to where `state` was taken, of a stream over the same tasks."""
        self._rng.setstate(state["rng"])
        for family, ids in state["left"].items():
            by_id = {task.id: task for task in self._tasks[family]}
            self._left[family] = deque(by_id[task] for task in ids)
        self._round, self._next = deque(state["round"]), state["next"]

    def _group(self) -> PromptGroup:
        if not self._round:
            order = sorted(self._tasks)
            self._rng.shuffle(order)
            self._round.extend(order)
        family = self._round.popleft()
        if not self._left[family]:
            tasks = list(self._tasks[family])
            self._rng.shuffle(tasks)
            self._left[family].extend(tasks)
        identity, self._next = self._next, self._next + 1
        return PromptGroup(identity, self._left[family].popleft(), self._seeds(identity))

    def _seeds(self, number: int) -> tuple[int, ...]:
        """By the group's number alone, so that neither schedule nor restart changes what an episode draws."""
        rng = random.Random(f"{self._seed}/group/{number}")
        return tuple(rng.getrandbits(62) for _ in range(self._group_size))


def by_family(tasks: Sequence[TaskRecord]) -> dict[str, list[TaskRecord]]:
    """Tasks of each environment, environments in alphabetical order."""
    families = sorted({task.environment for task in tasks})
    return {family: [task for task in tasks if task.environment == family] for family in families}


def balanced(tasks: Sequence[TaskRecord], per_family: int) -> list[TaskRecord]:
    """The first `per_family` tasks of each environment, or all where there are fewer."""
    return [task for family in by_family(tasks).values() for task in family[:per_family]]
