"""Sampled pass@1 on the validation split: per family, and their mean, which chooses the checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from components.post_training.worker import RolloutWorker
from components.rollouts.loop import transcript
from components.runtime.contracts import TaskRecord
from components.runtime.errors import InputError


@dataclass(frozen=True)
class Validation:
    """macro: mean of the families' pass@1. faulty: tasks left out, whose episode was faulty.

    episodes: of each task its `family`, whether it `passed`, and its `text`, for people to read.
    """

    macro: float
    by_family: dict[str, float]
    faulty: int
    episodes: list[dict[str, str | bool]] = field(default_factory=list, compare=False)

    def metrics(self) -> dict[str, float]:
        families = {f"rl/validation_pass_at_1/{name}": value for name, value in self.by_family.items()}
        return {"rl/validation_pass_at_1": self.macro, **(families if len(families) > 1 else {})}


def validate(worker: RolloutWorker, tasks: Sequence[TaskRecord]) -> Validation:
    """Play each task once; the same seeds each time, so that checkpoints compare.

    Raises InputError when no task of a family can be judged.
    """
    results = worker.episodes(tasks, [1_000_003 + index for index in range(len(tasks))])
    rewards: dict[str, list[float]] = {}
    faults: dict[str, str] = {}
    for result in results:
        family = result.task.environment
        found = rewards.setdefault(family, [])
        if result.fault:
            faults[family] = f"task {result.task.id[:12]}: {result.fault}"
        else:
            found.append(result.verdict.reward)
    broken = [family for family, found in rewards.items() if not found]
    if broken:
        raise InputError(
            f"no validation task of {', '.join(broken)} can be judged ({faults[broken[0]]}); repair the environment"
        )
    by_family = {family: sum(found) / len(found) for family, found in sorted(rewards.items())}
    counted = sum(map(len, rewards.values()))
    episodes: list[dict[str, str | bool]] = [
        {"family": result.task.environment, "passed": result.verdict.passed, "text": transcript(result)}
        for result in results
    ]
    return Validation(sum(by_family.values()) / len(by_family), by_family, len(results) - counted, episodes)
