"""Rollout workers as Ray actors. Weights travel through Ray's object store, with their version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError
from tokenizers import Tokenizer

from components.environments.protocol import Environment
from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptGroup
from components.post_training.remote_environment import RemoteEnvironments
from components.post_training.worker import PlayedGroup, RolloutWorker
from components.runtime.errors import InputError
from model import ModelConfig, Transformer

PLACE_SECONDS = 180.0  # for an actor to start, imports included
RESTARTS = 3  # of workers that died, in one run


class RolloutActor:
    """A rollout worker in a process of its own. Weights may arrive while it plays; the next play starts with them."""

    def __init__(
        self,
        config: PostTrainingConfig,
        model: ModelConfig,
        tokenizer: str,
        environments: Mapping[str, Environment],
        sequence_tokens: int,
    ) -> None:
        self.config = config
        if config.environment_workers:
            environments = RemoteEnvironments(environments, config).by_name()
        self.worker = RolloutWorker(
            config, Transformer(model), Tokenizer.from_str(tokenizer), environments, sequence_tokens
        )
        self.loaded = -1  # the worker's own weights are random until the first play
        self.offered: tuple[int, Mapping[str, torch.Tensor]] | None = None

    def ready(self) -> bool:
        return True

    @ray.method(concurrency_group="weights")
    def offer(self, version: int, state: Mapping[str, torch.Tensor]) -> None:
        """Weights for the next play."""
        self.offered = (version, state)

    def play(
        self, groups: Sequence[PromptGroup], version: int = -1, state: Mapping[str, torch.Tensor] | None = None
    ) -> list[PlayedGroup]:
        """Play with the weights given, or else with those offered last."""
        torch.set_num_threads(self.config.worker_threads)
        if state is None and self.offered is not None:
            version, state = self.offered
        if state is None:
            raise RuntimeError("a rollout worker was asked to play before it was given weights")
        if version != self.loaded:
            self.worker.load(version, state)
            self.loaded = version
        return self.worker.play(groups)


# a thread of its own for weights, so that they do not wait for a play to end
_options: dict[str, Any] = {"concurrency_groups": {"weights": 1}, "max_restarts": 0}
ACTOR: Any = ray.remote(**_options)(RolloutActor)


class RayPool:
    """Groups are split evenly over the workers, in order. The asynchronous schedule lets workers take newer weights."""

    def __init__(
        self,
        config: PostTrainingConfig,
        model: Transformer,
        tokenizer: Tokenizer,
        environments: Mapping[str, Environment],
        sequence_tokens: int,
    ) -> None:
        self.config, self.model = config, model
        self.newest = config.schedule == "asynchronous"
        self._arguments = (config, model.config, tokenizer.to_str(), dict(environments), sequence_tokens)
        self._out: dict[Any, tuple[int, list[PromptGroup]]] = {}
        self._restarts = 0
        self.workers = [self._start() for _ in range(config.rollout_workers)]
        try:
            ray.get([worker.ready.remote() for worker in self.workers], timeout=PLACE_SECONDS)
        except GetTimeoutError as error:
            raise InputError(
                f"Ray did not place {config.rollout_workers} rollout workers of {config.worker_threads} CPU in "
                f"{PLACE_SECONDS:.0f} s; free are {_shown(ray.available_resources())}; stop other jobs, or lower "
                "post_training.rollout_workers"
            ) from error
        self.publish(0)
        ray.get(self._offered)  # a play may overtake the first weights otherwise

    def _start(self) -> Any:
        return ACTOR.options(num_cpus=self.config.worker_threads).remote(*self._arguments)

    def publish(self, version: int) -> None:
        self._version = version
        # put copies: what the learner does next does not reach the workers
        self._weights = ray.put({name: tensor.detach() for name, tensor in self.model.state_dict().items()})
        self._offered = [worker.offer.remote(version, self._weights) for worker in self.workers if self.newest]

    def submit(self, groups: Sequence[PromptGroup]) -> None:
        size = -(-len(groups) // len(self.workers))
        if self.newest:
            size = min(size, -(-self.config.prompts // len(self.workers)))
        chunks = [list(groups[start : start + size]) for start in range(0, len(groups), size)]
        for chunk in chunks:
            busy = [sum(worker == index for worker, _ in self._out.values()) for index in range(len(self.workers))]
            self._play(busy.index(min(busy)), chunk)

    def _play(self, worker: int, groups: list[PromptGroup]) -> None:
        weights = () if self.newest else (self._version, self._weights)
        self._out[self.workers[worker].play.remote(groups, *weights)] = (worker, groups)

    def collect(self) -> list[PlayedGroup]:
        if not self._out:
            return []
        ray.wait(list(self._out), num_returns=1)
        ready, _ = ray.wait(list(self._out), num_returns=len(self._out), timeout=0)
        done = next(reference for reference in self._out if reference in ready)  # the oldest, lest it age further
        worker, groups = self._out.pop(done)
        try:
            return ray.get(done)
        except (ActorDiedError, ActorUnavailableError) as error:
            self._replace(worker, groups, error)
            return self.collect()

    def _replace(self, index: int, groups: list[PromptGroup], error: Exception) -> None:
        """A worker died: another takes its place and plays what it had. Raises RuntimeError when that happens often."""
        self._restarts += 1
        if self._restarts > RESTARTS:
            raise RuntimeError(f"rollout workers died {self._restarts} times, the last: {error}") from error
        self.workers[index] = self._start()
        if self.newest:
            ray.get(self.workers[index].offer.remote(self._version, self._weights))
        lost = [(reference, kept) for reference, (worker, kept) in self._out.items() if worker == index]
        for reference, _ in lost:
            del self._out[reference]
        for chunk in [groups, *(kept for _, kept in lost)]:
            self._play(index, chunk)


def _shown(found: Mapping[str, float]) -> str:
    return ", ".join(f"{found[name]:g} {name}" for name in ("CPU", "GPU") if found.get(name)) or "no CPU"
