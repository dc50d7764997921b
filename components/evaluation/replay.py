"""Plays recorded episodes again: from their tokens through the environment, or anew with the checkpoint.

The first needs no model: an engine that reads the recorded tokens stands in for the one that sampled them, so the same
agent loop parses the same turns, the environment answers them, and the verifier judges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import cast

import torch
from tokenizers import Tokenizer

from components.environments.chat_format import END
from components.environments.protocol import environment
from components.evaluation.play import Item, Player, item_of, play
from components.rollouts import EnginePolicy, EpisodeRequest, run_episodes
from components.runtime.contracts import TaskRecord
from model.engine import Engine, SamplingParameters, Trajectory
from model.engine.engine import Turn

FROM_THE_PLAY = (
    "player", "measure", "temperature", "sample", "position", "weights", "tokenizer_sha256", "task_set", "code",
)  # fmt: skip
CHUNK = 1000  # episodes replayed at once


@dataclass
class _Tape:
    recorded: Sequence[int]
    ids: list[int]
    sampled: list[bool]
    limit: int
    running: bool = True


@dataclass
class RecordedEngine:
    """The part of `Engine` that a policy uses, fed from records in the order in which sequences are added."""

    stop_token_id: int
    records: Iterable[Sequence[int]]
    tapes: list[_Tape] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._next = iter(self.records)

    def add(self, prompt_ids: Sequence[int], sampling: SamplingParameters, *, max_total_tokens: int) -> int:
        self.tapes.append(_Tape(next(self._next), list(prompt_ids), [False] * len(prompt_ids), max_total_tokens))
        return len(self.tapes) - 1

    def extend(self, handle: int, token_ids: Sequence[int]) -> bool:
        tape = self.tapes[handle]
        if len(tape.ids) + len(token_ids) >= tape.limit:
            return False
        tape.ids += token_ids
        tape.sampled += [False] * len(token_ids)
        tape.running = True
        return True

    def step(self) -> list[Turn]:
        turns = []
        for handle, tape in enumerate(self.tapes):
            if not tape.running:
                continue
            tape.running = False
            rest = list(tape.recorded[len(tape.ids) : tape.limit])
            stopped = self.stop_token_id in rest
            ids = rest[: rest.index(self.stop_token_id) + 1] if stopped else rest
            tape.ids += ids
            tape.sampled += [True] * len(ids)
            if not stopped and len(tape.ids) < tape.limit:  # no engine ends a turn here: never equal to the record
                tape.ids.append(-1)
                tape.sampled.append(True)
            turns.append(Turn(handle, ids, [0.0] * len(ids), "stop" if stopped else "length"))
        return turns

    def release(self, handle: int) -> Trajectory:
        tape = self.tapes[handle]
        tape.running = False
        length = len(tape.ids)
        return Trajectory(
            token_ids=torch.tensor(tape.ids),
            sampled=torch.tensor(tape.sampled),
            logprobs=torch.zeros(length),
            weight_versions=torch.zeros(length, dtype=torch.int64),
            routing=torch.zeros(0, length, 0, dtype=torch.int16),
            sampling_masks=None,
            temperature=1.0,
            finish_reason="stop",
        )


def judge_again(items: Sequence[Item], tasks: Mapping[str, TaskRecord], tokenizer: Tokenizer) -> list[str]:
    """What differs when the recorded tokens are played through the environments: one line for each unlike episode.

    Compares every field of the record, the verdict and the tool results' tokens among them; faulty episodes are left
    out. Raises KeyError for a task that `tasks` lacks.
    """
    stop = tokenizer.token_to_id(END)
    if stop is None:
        return [f"the tokenizer lacks {END}"]
    told = []
    sound = [item for item in items if not item.fault]
    environments = {name: environment(name) for name in {item.family for item in sound}}
    for start in range(0, len(sound), CHUNK):
        part = sound[start : start + CHUNK]
        engine = RecordedEngine(stop, [item.token_ids for item in part])
        policy = EnginePolicy(cast(Engine, engine), tokenizer, SamplingParameters())
        requests = [EpisodeRequest(environments[item.family], tasks[item.task], item.seed) for item in part]
        for item, result in zip(part, run_episodes(policy, requests), strict=True):
            again = item_of(result, **{name: getattr(item, name) for name in FROM_THE_PLAY})
            unlike = [f.name for f in fields(Item) if getattr(again, f.name) != getattr(item, f.name)]
            if unlike:
                told.append(f"{describe(item)}: {_difference(item, again, unlike)}")
    return told


def _difference(item: Item, again: Item, unlike: Sequence[str]) -> str:
    if "reward" in unlike:
        return f"recorded verdict {item.reward:g}, the environment's is {again.reward:g} ({again.reason})"
    if "token_ids" in unlike:
        return f"the recorded tokens are not those of this conversation from token {first_unlike(item, again)} on"
    return f"{', '.join(unlike)} not as recorded"


def first_unlike(one: Item, other: Item) -> int:
    """Index of the first token that differs."""
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one.token_ids), len(other.token_ids)))


def describe(item: Item) -> str:
    sample = f", sample {item.sample}" if item.sample else ""
    return f"{item.player}, {item.measure} at {item.temperature:g}, task {item.task[:12]}{sample}"


def generate_again(
    chosen: Sequence[Item],
    everything: Sequence[Item],
    players: Mapping[str, Player],
    tasks: Mapping[str, TaskRecord],
    *,
    seed: int,
    max_sequences: int,
) -> tuple[list[str], int]:
    """Plays the chosen episodes anew: what differs, and how many needed the recorded batch to come out equal.

    An episode's random numbers do not depend on its batch, but a product of matrices may round otherwise in another
    batch; so an episode that differs is judged by a replay of its whole play, in the recorded order.
    """
    told: list[str] = []
    needed = 0
    for player, measure, temperature in dict.fromkeys((i.player, i.measure, i.temperature) for i in chosen):
        whole = [i for i in everything if (i.player, i.measure, i.temperature) == (player, measure, temperature)]
        whole.sort(key=lambda item: item.position)
        wanted = [i for i in chosen if (i.player, i.measure, i.temperature) == (player, measure, temperature)]
        samples = max(item.sample for item in whole) + 1

        def again(
            these: list[Item], player: str = player, measure: str = measure, t: float = temperature, n: int = samples
        ) -> dict[tuple[str, int], Item]:
            order = [tasks[task] for task in dict.fromkeys(item.task for item in these)]
            played, _ = play(
                players[player],
                order,
                measure=measure,
                temperature=t,
                seed=seed,
                max_sequences=max_sequences,
                samples=n,
            )
            return {(item.task, item.sample): item for item in played}

        found = again(wanted)
        unlike = [i for i in wanted if found[i.task, i.sample].token_ids != i.token_ids]
        if not unlike:
            continue
        found = again(whole)
        for item in unlike:
            other = found[item.task, item.sample]
            if other.token_ids == item.token_ids:
                needed += 1
            else:
                told.append(f"{describe(item)}: the checkpoint writes another token {first_unlike(item, other)}")
    return told, needed
