"""Environments in Ray actors: what they do, and how long it takes, cannot disturb the process that plays."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError

from components.environments.protocol import Environment, Episode, Observation, Verdict
from components.post_training.config import PostTrainingConfig
from components.post_training.ray_cluster import ENVIRONMENT_CPUS
from components.runtime.contracts import TaskRecord, ToolCall, ToolDefinition


class EnvironmentActor:
    """Plays the environment's side of many episodes."""

    def __init__(self, environments: Mapping[str, Environment]) -> None:
        self.environments = environments
        self.episodes: dict[int, Episode] = {}

    def reset(self, episode: int, task: TaskRecord) -> None:
        self.episodes[episode] = self.environments[task.environment].reset(task)

    def step(self, episode: int, call: ToolCall) -> Observation:
        return self.episodes[episode].step(call)

    def state_hash(self, episode: int) -> str:
        return self.episodes[episode].state_hash()

    def verdicts(self, episode: int) -> list[Verdict]:
        """The verdict, twice (see `components.rollouts.guard`), and the end of the episode."""
        found = self.episodes.pop(episode)
        return [found.verdict(), found.verdict()]


# a call that hangs keeps its thread, and the others go on; a new actor takes over when few are left
THREADS = 8
_options: dict[str, Any] = {"num_cpus": ENVIRONMENT_CPUS, "max_restarts": 0, "max_concurrency": THREADS}
ACTOR: Any = ray.remote(**_options)(EnvironmentActor)


class RemoteEnvironments:
    """The actors of one rollout worker. A call that takes too long spoils its own episode."""

    def __init__(self, environments: Mapping[str, Environment], config: PostTrainingConfig) -> None:
        self.environments, self.seconds = environments, config.environment_seconds
        self.actors = [ACTOR.remote(environments) for _ in range(config.environment_workers)]
        self.hanging = [0] * config.environment_workers
        self.turn, self.numbers = itertools.count(), itertools.count()

    def by_name(self) -> dict[str, Environment]:
        return {name: _RemoteEnvironment(self, found) for name, found in self.environments.items()}

    def call(self, actor: Any, method: str, *arguments: Any) -> Any:
        """What the actor answers. Raises TimeoutError when it takes too long, and what the environment raises."""
        try:
            return ray.get(getattr(actor, method).remote(*arguments), timeout=self.seconds)
        except GetTimeoutError as error:
            if actor in self.actors:
                self._note_hanging(self.actors.index(actor))
            raise TimeoutError(f"{method} took more than {self.seconds:g} s") from error

    def _note_hanging(self, index: int) -> None:
        self.hanging[index] += 1
        if self.hanging[index] == THREADS - 1:
            ray.kill(self.actors[index])
            self.actors[index], self.hanging[index] = ACTOR.remote(self.environments), 0


class _RemoteEnvironment:
    def __init__(self, owner: RemoteEnvironments, local: Environment) -> None:
        self.owner, self.local = owner, local
        self.name, self.version = local.name, local.version

    def tools(self) -> list[ToolDefinition]:
        return self.local.tools()

    def vocabulary(self) -> list[str]:
        return self.local.vocabulary()

    def templates(self) -> list[str]:
        return self.local.templates()

    def generate(self, template: str, seed: int, split: str) -> TaskRecord:
        return self.local.generate(template, seed, split)

    def random_call(self, task: TaskRecord, rng: random.Random) -> ToolCall:
        return self.local.random_call(task, rng)

    def reset(self, task: TaskRecord) -> Episode:
        owner, number = self.owner, next(self.owner.numbers)
        actor = owner.actors[next(owner.turn) % len(owner.actors)]
        owner.call(actor, "reset", number, task)
        return _RemoteEpisode(owner, actor, number)


class _RemoteEpisode:
    def __init__(self, owner: RemoteEnvironments, actor: Any, number: int) -> None:
        self.owner, self.actor, self.number = owner, actor, number
        self._verdicts: list[Verdict] = []

    def step(self, call: ToolCall) -> Observation:
        return self.owner.call(self.actor, "step", self.number, call)

    def state_hash(self) -> str:
        return self.owner.call(self.actor, "state_hash", self.number)

    def verdict(self) -> Verdict:
        if not self._verdicts:
            self._verdicts = self.owner.call(self.actor, "verdicts", self.number)
        return self._verdicts.pop()
