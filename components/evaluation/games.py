"""The plays and readings of an evaluation as jobs, side by side in worker processes.

A play is one job, never split: which episodes share a batch does not depend on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from components.evaluation import long_context
from components.evaluation.config import EvaluationConfig
from components.evaluation.long_context import Found, Losses
from components.evaluation.measures import SAMPLED
from components.evaluation.play import Item, Player, logprob_gap, play
from components.rollouts import EpisodeResult
from components.rollouts.loop import episode_trace, transcript
from components.runtime.contracts import Document, TaskRecord
from components.runtime.processes import threads_of_each
from components.runtime.stage import StageContext
from components.runtime.workers import Workers, tell
from model.context import Selection

_SHOWN_EVERY, _TRACED_EVERY = 50, 500  # episodes


@dataclass(frozen=True)
class Game:
    """One play: who plays which tasks, how often, at which temperature."""

    player: str
    tasks: Sequence[TaskRecord]
    measure: str
    temperature: float
    samples: int = 1

    @property
    def size(self) -> int:
        return len(self.tasks) * self.samples

    @property
    def name(self) -> str:
        return f"{self.player}, {self.measure} at {self.temperature:g}"


@dataclass(frozen=True)
class Played:
    """The records of a play; `logprob_gap` (nats) is of the first trajectories of the play at temperature 1."""

    items: list[Item]
    logprob_gap: float = 0.0


@dataclass(frozen=True)
class Reading:
    """The model after RL reads documents with each kind of attention, and its indexer's selections are looked at."""

    documents: list[Document]
    validation: list[Document]

    @property
    def size(self) -> int:
        return (len(long_context.KINDS) + 1) * len(self.documents) + len(self.validation)


@dataclass(frozen=True)
class Read:
    top_k: int
    by_kind: dict[Selection, Losses]
    validation: list[Found]
    test: list[Found]


@dataclass(frozen=True)
class _Told:
    """What a job tells: so much more is done; of an episode also whether it passed, and now and then how it went."""

    done: int
    game: str = ""
    passed: bool = False
    transcript: str = ""
    trace: Any = None


@dataclass(frozen=True)
class _Room:
    """What every job finds in its process."""

    config: EvaluationConfig
    seed: int
    task_set: str
    code: str
    players: dict[str, Player]


_room: _Room


class Games:
    """Workers with the checkpoints of `directories` (player's name -> folder and sha256 of its manifest)."""

    def __init__(
        self, config: EvaluationConfig, context: StageContext, task_set: str, directories: dict[str, tuple[Path, str]]
    ) -> None:
        self.context = context
        threads = threads_of_each(config.threads, config.processes)
        arguments = (config, context.seed, task_set, context.code, directories, threads)
        self._workers = Workers(config.processes, _enter, *arguments)

    def __enter__(self) -> Games:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._workers.__exit__(kind, error, trace)

    def play(
        self, phase: str, games: Sequence[Game], reading: Reading | None = None
    ) -> tuple[list[Played], Read | None]:
        """Every game that has tasks, in order, and the reading where there is one."""
        games = [game for game in games if game.tasks]
        readings = [reading] if reading else []
        # longest first, so that no worker begins a long game when the others are done
        order = sorted(range(len(games)), key=lambda number: -games[number].size)
        jobs: list[Callable[[], Any]] = [partial(_read, one) for one in readings]
        jobs += [partial(_play, games[number]) for number in order]
        self.context.progress.phase(phase)
        total = sum(game.size for game in games) + sum(one.size for one in readings)
        results = self._workers.run(jobs, self._shower(total))
        played = dict(zip(order, results[len(readings) :], strict=True))
        return [played[number] for number in range(len(games))], results[0] if readings else None

    def _shower(self, total: int) -> Callable[[_Told], None]:
        done, rates = 0, dict[str, tuple[int, int]]()

        def show(told: _Told) -> None:
            nonlocal done
            done += told.done
            values = {}
            if told.game:
                passed, played = rates.get(told.game, (0, 0))
                rates[told.game] = (passed + told.passed, played + 1)
                values[f"pass@1 {told.game}"] = (passed + told.passed) / (played + 1)
            self.context.progress.update(done, total, values)
            if told.transcript:
                self.context.progress.episode(told.transcript)
            if told.trace:
                self.context.tracker.trace(told.trace)

        return show


def _enter(
    config: EvaluationConfig,
    seed: int,
    task_set: str,
    code: str,
    directories: dict[str, tuple[Path, str]],
    threads: int,
) -> None:
    global _room
    torch.set_num_threads(threads)
    players = {name: Player.load(name, *found) for name, found in directories.items()}
    _room = _Room(config, seed, task_set, code, players)


def _play(game: Game) -> Played:
    player, done = _room.players[game.player], 0

    def show(result: EpisodeResult) -> None:
        nonlocal done
        shown = transcript(result) if done % _SHOWN_EVERY == 0 else ""
        trace = episode_trace(result) if done % _TRACED_EVERY == 0 else None
        tell(_Told(1, game.name, result.verdict.passed, shown, trace))
        done += 1

    items, trajectories = play(
        player,
        game.tasks,
        measure=game.measure,
        temperature=game.temperature,
        seed=_room.seed,
        max_sequences=_room.config.max_sequences,
        samples=game.samples,
        task_set=_room.task_set,
        code=_room.code,
        on_episode=show,
    )
    if game.measure != "sampled" or game.temperature != SAMPLED:
        return Played(items)
    return Played(items, logprob_gap(player.model, trajectories[: _room.config.logprob_trajectories]))


def _read(reading: Reading) -> Read:
    player, config = _room.players["after"], _room.config

    def tick(number: int) -> None:
        tell(_Told(number))

    by_kind = {
        kind: long_context.losses(
            player.model,
            player.tokenizer,
            reading.documents,
            kind,
            batch=config.document_batch,
            seed=_room.seed,
            tick=tick,
        )
        for kind in long_context.KINDS
    }
    validation, test = (
        long_context.evidence_found(player.model, player.tokenizer, group, batch=config.document_batch, tick=tick)
        for group in (reading.validation, reading.documents)
    )
    return Read(player.model.config.index_topk, by_kind, validation, test)
