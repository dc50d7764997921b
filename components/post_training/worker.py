"""The rollout worker: an engine with its weights, the environments, and the agent loop that plays prompt groups.

It is the same in the learner's process and as a Ray actor. A faulty episode spoils its own group and nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from components.environments.chat_format import END, prompt_words
from components.environments.protocol import Environment, Verdict
from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptGroup
from components.rollouts import EnginePolicy, EpisodeRequest, EpisodeResult, run_episodes
from components.runtime.contracts import TaskRecord
from components.runtime.errors import InputError
from components.runtime.ranks import Ranks
from model import Transformer
from model.engine import Engine, SamplingParameters


@dataclass
class PlayedGroup:
    """The episodes of a group, played with the weights `version`. `fault`: what spoiled it, or ""."""

    id: int
    task: TaskRecord
    episodes: list[EpisodeResult]
    version: int
    fault: str = ""


class RolloutWorker:
    """Sequences have at most `sequence_tokens` tokens. The engine reads `model`'s own weights, or a bfloat16 copy."""

    def __init__(
        self,
        config: PostTrainingConfig,
        model: Transformer,
        tokenizer: Tokenizer,
        environments: Mapping[str, Environment],
        sequence_tokens: int,
        ranks: Ranks | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        stop = tokenizer.token_to_id(END)
        if stop is None:
            raise InputError(f"the checkpoint's tokenizer has no {END}; it was not made for this chat format")
        self.source = model
        self.model = model
        if config.rollout_dtype == "bfloat16":
            self.model = copy.deepcopy(model).requires_grad_(False).to(torch.bfloat16)
        self.model.eval()
        self.environments = environments
        # environments in processes of their own have a deadline too, which comes first and says more
        self.call_seconds = config.environment_seconds + (5 if config.environment_workers else 0)
        sequences = math.ceil((config.max_sequences or config.prompts * config.group_size) / self.ranks.size)
        self.engine = Engine(
            self.model,
            stop_token_id=stop,
            max_sequences=sequences,
            max_sequence_tokens=sequence_tokens,
            record_selections=config.keep_selection,
            cache_tokens=min(sequences * sequence_tokens, max(config.cache_tokens, sequence_tokens)),
        )
        sampling = SamplingParameters(config.temperature, config.top_p, max_new_tokens=config.turn_tokens)
        self.policy = EnginePolicy(self.engine, tokenizer, sampling)

    @property
    def version(self) -> int:
        """Version of the weights that the engine holds."""
        return self.engine.weight_version

    def load(self, version: int, state: Mapping[str, torch.Tensor] | None = None) -> None:
        """Take new weights: `state`, or what the model that was given at the start holds by now."""
        if state is not None or self.model is not self.source:
            self.model.load_state_dict(self.source.state_dict() if state is None else state)
        self.engine.weight_version = version

    def episodes(self, tasks: Sequence[TaskRecord], seeds: Sequence[int]) -> list[EpisodeResult]:
        """Play each task with its seed; every rank plays its share.

        A prompt that is too long is a fault, as what an environment does wrong is.
        """
        pairs = list(zip(tasks, seeds, strict=True))
        orders = [("play", share, self.version) for share in self.ranks.shares(pairs)]
        _, share, _ = self.ranks.deal(orders)
        parts = self.ranks.to_first(self.play_share(share))
        return [parts[index % self.ranks.size][index // self.ranks.size] for index in range(len(pairs))]

    def play_share(self, pairs: Sequence[tuple[TaskRecord, int]]) -> list[EpisodeResult]:
        """This rank's part of `episodes`, with the weights of the last `load`, which need not be the newest."""
        self.model.eval()
        tasks = [task for task, _ in pairs]
        unfit = {
            task.id: reason for task in {task.id: task for task in tasks}.values() if (reason := self._unfit(task))
        }
        requests = [
            EpisodeRequest(self.environments[task.environment], task, seed)
            for task, seed in pairs
            if task.id not in unfit
        ]
        played = iter(run_episodes(self.policy, requests, call_seconds=self.call_seconds))
        return [
            EpisodeResult(task, seed, [], Verdict(0.0, unfit[task.id]), None, 0, 0, "fault", unfit[task.id])
            if task.id in unfit
            else next(played)
            for task, seed in pairs
        ]

    def _unfit(self, task: TaskRecord) -> str:
        """Why a task cannot be played; "" when it can."""
        tokens = len(self.policy.encode(prompt_words(task.messages, task.tools)))
        limit = min(task.limits.tokens, self.engine.max_sequence_tokens)
        return "" if tokens < limit else f"prompt_too_long: {tokens} tokens leave no room in a sequence of {limit}"

    def play(self, groups: Sequence[PromptGroup]) -> list[PlayedGroup]:
        """Play all groups at once."""
        played = self.episodes(
            [group.task for group in groups for _ in group.seeds], [seed for group in groups for seed in group.seeds]
        )
        results, start = [], 0
        for group in groups:
            episodes = played[start : start + len(group.seeds)]
            start += len(group.seeds)
            fault = next((episode.fault for episode in episodes if episode.fault), "")
            results.append(PlayedGroup(group.id, group.task, episodes, self.version, fault))
        return results
