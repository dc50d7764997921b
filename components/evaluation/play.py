"""Plays tasks with a checkpoint on the engine, and keeps a record of every episode.

The seed of an episode depends on the run's seed and the task alone, so that two models meet the same tasks with the
same random numbers: the pairs of the paired bootstrap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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

    @staticmethod
    def load(name: str, directory: Path) -> Player:
        """Raises InputError when the checkpoint is damaged."""
        try:
            return Player(name, load_model(directory, dtype=torch.float32), load_tokenizer(directory))
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


def episode_seed(seed: int, task: TaskRecord) -> int:
    """Seed of the episode of `task` (63 bits): the same for every model and temperature."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{task.id}".encode()).digest()[:8], "big") >> 1


def play(
    player: Player,
    tasks: Sequence[TaskRecord],
    *,
    measure: str,
    temperature: float,
    seed: int,
    max_sequences: int,
    on_episode: Callable[[EpisodeResult], None] | None = None,
) -> tuple[list[Item], list[Trajectory]]:
    """Play every task once; records and trajectories in the order of `tasks`."""
    longest = max(task.limits.tokens for task in tasks)
    stop = player.tokenizer.token_to_id(END)
    if stop is None:
        raise InputError(f"the tokenizer of the checkpoint {player.name} lacks {END}; it cannot end a turn")
    engine = Engine(
        player.model,
        stop_token_id=stop,
        max_sequences=min(max_sequences, len(tasks)),
        max_sequence_tokens=longest,
        record=False,
    )
    # a turn may be as long as the episode: limits.tokens ends it, as in training
    policy = EnginePolicy(engine, player.tokenizer, SamplingParameters(temperature=temperature, max_new_tokens=longest))
    environments = {name: environment(name) for name in {task.environment for task in tasks}}
    requests = [EpisodeRequest(environments[task.environment], task, episode_seed(seed, task)) for task in tasks]
    results = run_episodes(policy, requests, on_episode=on_episode)
    items = [_item(player.name, measure, temperature, result) for result in results]
    return items, [result.trajectory for result in results if result.trajectory is not None]


def _item(player: str, measure: str, temperature: float, result: EpisodeResult) -> Item:
    return Item(
        player=player,
        measure=measure,
        temperature=temperature,
        task=result.task.id,
        family=result.task.environment,
        template=result.task.template,
        seed=result.seed,
        reward=result.verdict.reward,
        ended=result.ended,
        reason=result.verdict.reason,
        turns=result.turns,
        tool_errors=result.tool_errors,
        tokens=0 if result.trajectory is None else len(result.trajectory),
        transcript=transcript(result),
    )


def write_items(items: Sequence[Item], path: Path) -> None:
    """All episodes as Parquet, one row each."""
    columns = {name: [getattr(item, name) for item in items] for name in Item.__dataclass_fields__}
    parquet.write_table(pa.table(columns), path, compression="zstd")


def read_items(path: Path) -> list[Item]:
    with parquet.ParquetFile(path) as file:
        return [Item(**row) for row in file.read().to_pylist()]


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
