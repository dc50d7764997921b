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

    def verdict(self, episode: int) -> Verdict:
        return self.episodes.pop(episode).verdict()


ACTOR: Any = ray.remote(num_cpus=ENVIRONMENT_CPUS, max_restarts=0)(EnvironmentActor)


class RemoteEnvironments:
    """The actors of one rollout worker. One that takes too long is replaced; its other episodes end as faulty."""

    def __init__(self, environments: Mapping[str, Environment], config: PostTrainingConfig) -> None:
        self.environments, self.seconds = environments, config.environment_seconds
        self.actors = [ACTOR.remote(environments) for _ in range(config.environment_workers)]
        self.turn, self.numbers = itertools.count(), itertools.count()

    def by_name(self) -> dict[str, Environment]:
        return {name: _RemoteEnvironment(self, found) for name, found in self.environments.items()}

    def call(self, actor: Any, method: str, *arguments: Any) -> Any:
        """What the actor answers. Raises TimeoutError when it takes too long, and what the environment raises."""
        try:
            return ray.get(getattr(actor, method).remote(*arguments), timeout=self.seconds)
        except GetTimeoutError as error:
            if actor in self.actors:
                ray.kill(actor)
                self.actors[self.actors.index(actor)] = ACTOR.remote(self.environments)
            raise TimeoutError(f"{method} took more than {self.seconds:g} s") from error


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

    def step(self, call: ToolCall) -> Observation:
        return self.owner.call(self.actor, "step", self.number, call)

    def state_hash(self) -> str:
        return self.owner.call(self.actor, "state_hash", self.number)

    def verdict(self) -> Verdict:
        return self.owner.call(self.actor, "verdict", self.number)
