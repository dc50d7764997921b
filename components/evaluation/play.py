"""Plays tasks with a checkpoint on the engine, and keeps a record of every episode.

The seed of an episode depends on the run's seed and the task alone, so that two models meet the same tasks with the
same random numbers: the pairs of the paired bootstrap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from tokenizers import Tokenizer

from components.environments.chat_format import END
from components.environments.protocol import environment
from components.rollouts import EnginePolicy, EpisodeRequest, EpisodeResult, run_episodes
from components.rollouts.loop import transcript
from components.runtime.contracts import TaskRecord
from components.runtime.errors import InputError
from model.checkpoint import CheckpointError, load_model, load_tokenizer
from model.context import PackedContext
from model.engine import Engine, SamplingParameters, Trajectory
from model.transformer import Transformer


@dataclass(frozen=True)
class Player:
    """A checkpoint that plays: `name` is before, after or champion."""

    name: str
    model: Transformer
    tokenizer: Tokenizer
    weights: str = ""  # sha256 of the checkpoint's manifest

    @staticmethod
    def load(name: str, directory: Path, weights: str = "") -> Player:
        """Raises InputError when the checkpoint is damaged."""
        try:
            return Player(name, load_model(directory, dtype=torch.float32), load_tokenizer(directory), weights)
        except CheckpointError as error:
            raise InputError(f"the checkpoint {name} in {directory} cannot be read: {error}") from error


@dataclass(frozen=True)
class Item:
    """One episode as the report's evidence: a row of items.parquet."""

    player: str
    measure: str  # sampled, greedy, long, validation
    temperature: float
    task: str
    family: str
    template: str
    seed: int
    reward: float
    ended: str
    reason: str
    turns: int
    tool_errors: int
    tokens: int
    transcript: str
    group: str = ""  # what was held out whole: the environment of a grammar, else the template
    sample: int = 0  # number of the episode among those of one task
    position: int = 0  # place in the play: it settles which episodes shared a batch
    fault: str = ""  # why the episode is faulty: it counts as failed
    prompt_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    weights: str = ""  # sha256 of the checkpoint's manifest
    tokenizer_sha256: str = ""
    task_set: str = ""  # sha256 of the task set's manifest
    code: str = ""  # digest of the stage's sources, where a pipeline gave it


def episode_seed(seed: int, task: TaskRecord, sample: int = 0) -> int:
    """Seed of an episode of `task` (63 bits): the same for every model and temperature."""
    text = f"{seed}/{task.id}/{sample}" if sample else f"{seed}/{task.id}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def tokenizer_sha256(tokenizer: Tokenizer) -> str:
    """sha256 (hex) of the tokenizer's own JSON."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def play(
    player: Player,
    tasks: Sequence[TaskRecord],
    *,
    measure: str,
    temperature: float,
    seed: int,
    max_sequences: int,
    samples: int = 1,
    task_set: str = "",
    code: str = "",
    on_episode: Callable[[EpisodeResult], None] | None = None,
) -> tuple[list[Item], list[Trajectory]]:
    """Play every task `samples` times; records and trajectories in the order of `tasks`, samples of a task together."""
    longest = max(task.limits.tokens for task in tasks)
    stop = player.tokenizer.token_to_id(END)
    if stop is None:
        raise InputError(f"the tokenizer of the checkpoint {player.name} lacks {END}; it cannot end a turn")
    engine = Engine(
        player.model,
        stop_token_id=stop,
        max_sequences=min(max_sequences, len(tasks) * samples),
        max_sequence_tokens=longest,
        record=False,
    )
    # a turn may be as long as the episode: limits.tokens ends it, as in training
    policy = EnginePolicy(engine, player.tokenizer, SamplingParameters(temperature=temperature, max_new_tokens=longest))
    environments = {name: environment(name) for name in {task.environment for task in tasks}}
    requests = [
        EpisodeRequest(environments[task.environment], task, episode_seed(seed, task, sample))
        for task in tasks
        for sample in range(samples)
    ]
    results = run_episodes(policy, requests, on_episode=on_episode)
    shared = {
        "player": player.name,
        "measure": measure,
        "temperature": temperature,
        "weights": player.weights,
        "tokenizer_sha256": tokenizer_sha256(player.tokenizer),
        "task_set": task_set,
        "code": code,
    }
    items = [item_of(result, **shared, sample=n % samples, position=n) for n, result in enumerate(results)]
    return items, [result.trajectory for result in results if result.trajectory is not None]


def item_of(result: EpisodeResult, **fields: Any) -> Item:
    """The record of an episode; `fields` are those that the episode itself does not know."""
    trajectory = result.trajectory
    sampled = [] if trajectory is None else trajectory.sampled.nonzero().flatten()[:1].tolist()
    length = 0 if trajectory is None else len(trajectory)
    return Item(
        **fields,
        task=result.task.id,
        family=result.task.environment,
        template=result.task.template,
        group=group_of(result.task),
        seed=result.seed,
        reward=result.verdict.reward,
        ended=result.ended,
        reason=result.verdict.reason,
        fault=result.fault,
        turns=result.turns,
        tool_errors=result.tool_errors,
        tokens=length,
        prompt_tokens=sampled[0] if sampled else length,
        token_ids=() if trajectory is None else tuple(trajectory.token_ids.tolist()),
        transcript=transcript(result),
    )


def group_of(task: TaskRecord) -> str:
    """What synthesis holds out as one with this task: the `group` that the family tells of its template, or that."""
    describe = _describe(task.environment)
    return str(describe(task.template).get("group", task.template)) if describe else task.template


@lru_cache
def _describe(family: str) -> Callable[[str], Mapping[str, Any]] | None:
    found: Callable[[str], Mapping[str, Any]] | None = getattr(environment(family), "describe", None)
    return found


def write_items(items: Sequence[Item], path: Path) -> None:
    """All episodes as Parquet, one row each."""
    columns = {name: [getattr(item, name) for item in items] for name in Item.__dataclass_fields__}
    parquet.write_table(pa.table(columns), path, compression="zstd")


def read_items(path: Path) -> list[Item]:
    with parquet.ParquetFile(path) as file:
        return [Item(**row | {"token_ids": tuple(row["token_ids"])}) for row in file.read().to_pylist()]


@torch.inference_mode()
def logprob_gap(model: Transformer, trajectories: Sequence[Trajectory], batch: int = 16) -> float:
    """Largest |log-probability that the engine reported - that of one full forward|, in nats, over sampled tokens.

    The trajectories were sampled at temperature 1 without top-p.
    """
    worst = 0.0
    for start in range(0, len(trajectories), batch):
        part = trajectories[start : start + batch]
        ids_T = torch.cat([trajectory.token_ids for trajectory in part])
        logits_TV = model(ids_T, PackedContext.from_lengths([len(trajectory) for trajectory in part]))
        # row t predicts token t + 1; the first token of a sequence is never sampled
        sampled = torch.cat([trajectory.sampled for trajectory in part]).nonzero().flatten()
        full = logits_TV[sampled - 1].double().log_softmax(dim=-1).gather(1, ids_T[sampled, None]).squeeze(1)
        engine = torch.cat([trajectory.logprobs for trajectory in part])[sampled].double()
        if len(sampled):
            worst = max(worst, float((full - engine).abs().max()))
    return worst
