"""The rollout worker: an engine with its weights, the environments, and the agent loop that plays prompt groups.

It is the same in the learner's process and as a Ray actor. An environment that raises, or a reward that is no number in
[0, 1], spoils its own group and nothing else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer

from components.environments.chat_format import END, prompt_words
from components.environments.protocol import Environment, Episode, Observation, Verdict
from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptGroup
from components.rollouts import EnginePolicy, EpisodeRequest, EpisodeResult, run_episodes
from components.runtime.contracts import TaskRecord, ToolCall
from components.runtime.errors import InputError
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
    ) -> None:
        stop = tokenizer.token_to_id(END)
        if stop is None:
            raise InputError(f"the checkpoint's tokenizer has no {END}; it was not made for this chat format")
        self.source = model
        self.model = model
        if config.rollout_dtype == "bfloat16":
            self.model = copy.deepcopy(model).requires_grad_(False).to(torch.bfloat16)
        self.model.eval()
        self.environments = {name: _Guarded(found) for name, found in environments.items()}
        sequences = config.max_sequences or config.prompts * config.group_size
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
        """Play each task with its seed. The reward is NaN where the environment raised, or the prompt is too long."""
        self.model.eval()
        unfit = {
            task.id: reason for task in {task.id: task for task in tasks}.values() if (reason := self._unfit(task))
        }
        pairs = list(zip(tasks, seeds, strict=True))
        requests = [
            EpisodeRequest(self.environments[task.environment], task, seed)
            for task, seed in pairs
            if task.id not in unfit
        ]
        played = iter(run_episodes(self.policy, requests))
        return [
            EpisodeResult(task, seed, [], Verdict(math.nan, unfit[task.id]), None, 0, 0, "unfit")
            if task.id in unfit
            else next(played)
            for task, seed in pairs
        ]

    def _unfit(self, task: TaskRecord) -> str:
        """Why a task cannot be played; "" when it can."""
        tokens = len(self.policy.encode(prompt_words(task.messages, task.tools)))
        limit = min(task.limits.tokens, self.engine.max_sequence_tokens)
        return "" if tokens < limit else f"{_UNFIT} {tokens} tokens leaves no room in a sequence of {limit}"

    def play(self, groups: Sequence[PromptGroup]) -> list[PlayedGroup]:
        """Play all groups at once."""
        played = self.episodes(
            [group.task for group in groups for _ in group.seeds], [seed for group in groups for seed in group.seeds]
        )
        results, start = [], 0
        for group in groups:
            episodes = played[start : start + len(group.seeds)]
            start += len(group.seeds)
            fault = next((found for episode in episodes if (found := fault_of(episode))), "")
            results.append(PlayedGroup(group.id, group.task, episodes, self.version, fault))
        return results


def fault_of(episode: EpisodeResult) -> str:
    """Why an episode cannot be learned from or counted; "" when it can."""
    reward = episode.verdict.reward
    if not isinstance(reward, (int, float)):
        return f"the reward {reward!r} is no number"
    if not math.isfinite(reward):
        known = episode.verdict.reason.startswith((_RAISED, _UNFIT))
        return episode.verdict.reason if known else f"the reward is {reward}"
    if not 0 <= reward <= 1:
        return f"the reward {reward} lies outside [0, 1]"
    return ""


_RAISED, _UNFIT = "the environment raised ", "the prompt of"


class _Guarded:
    """An environment whose exceptions end the episode, with NaN as its reward and the exception as the reason."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def reset(self, task: TaskRecord) -> Episode:
        try:
            return _GuardedEpisode(self._environment.reset(task))
        except Exception as error:
            return _GuardedEpisode(None, error)


class _GuardedEpisode:
    def __init__(self, episode: Episode | None, error: Exception | None = None) -> None:
        self._episode, self._error = episode, error

    def step(self, call: ToolCall) -> Observation:
        if self._episode is not None and self._error is None:
            try:
                observation = self._episode.step(call)
                if not isinstance(observation, Observation) or not isinstance(observation.content, str):
                    raise TypeError(f"a step gave {type(observation).__name__}, no observation with text")
                return observation
            except Exception as error:
                self._error = error
        return Observation("", done=True, is_error=True)

    def state_hash(self) -> str:
        return self._episode.state_hash() if self._episode else ""

    def verdict(self) -> Verdict:
        if self._episode is not None and self._error is None:
            try:
                verdict = self._episode.verdict()
                if not isinstance(verdict, Verdict):
                    raise TypeError(f"the verifier gave {type(verdict).__name__}, no verdict")
                return verdict
            except Exception as error:
                self._error = error
        return Verdict(float("nan"), f"{_RAISED}{type(self._error).__name__}: {self._error}")
