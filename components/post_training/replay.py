"""Executes a recorded RL step again, and says whether everything came out the same, bit for bit.

    python -m components.post_training.replay --record DIR --tasks DIR --checkpoint DIR [--steps 1]

Rollouts and update are executed by the code that trained, from what the record holds. The tokens that the engine
produced, the weights after the update, and, on the way to a later step, the digests of every step are compared with
what was recorded. Then the learner looks at the recorded rollouts with the weights that sampled them: where its
log-probabilities are not the engine's, `divergence` finds the first token, layer and cause.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptSampler
from components.post_training.divergence import GAP, Divergence, diverge, gaps
from components.post_training.flow import Batch, Flow
from components.post_training.ledger import Ledger
from components.post_training.measurements import Material
from components.post_training.records import (
    ABOUT,
    LAYOUT,
    STATE,
    group_from_plain,
    rollouts_digest,
    weights_digest,
)
from components.post_training.run import follow
from components.post_training.schedule import LocalPool, synchronous
from components.post_training.trainer import Learner
from components.post_training.worker import PlayedGroup, RolloutWorker
from components.runtime.errors import InputError, exit_code
from components.runtime.ranks import Ranks, open_ranks
from components.runtime.stage import parse_config
from model import Transformer


@dataclass(frozen=True)
class Finding:
    """One thing that was compared. holds: None where it could not be."""

    name: str
    holds: bool | None
    detail: str


@dataclass
class Record:
    """A recorded step: `about` in plain values, `before` what the step began with, `played` its rollouts."""

    about: dict[str, Any]
    config: PostTrainingConfig
    before: dict[str, Any]
    played: list[PlayedGroup]
    trained: list[PlayedGroup]

    @property
    def step(self) -> int:
        """The step's number, counted from 1."""
        return int(self.about["step"])


def read_record(directory: Path, material: Material) -> Record:
    """Raises InputError for a record of another layout, or of other tasks."""
    about = json.loads((directory / ABOUT).read_text())
    if about.get("layout") != LAYOUT:
        raise InputError(f"{directory} has the layout {about.get('layout')}, this version reads {LAYOUT}")
    # published by us, under a hash that was checked; tensors and plain values only
    state = torch.load(directory / STATE, weights_only=True)
    config = parse_config(PostTrainingConfig, about["config"], f"the configuration in {directory / ABOUT}")
    tasks = {task.id: task for task in material.tasks}
    try:
        played = [group_from_plain(group, tasks) for group in state["played"]]
    except KeyError as error:
        raise InputError(f"the record's task {error} is not in the task set; give the one it was trained on") from error
    chosen = set(state["trained"])
    return Record(about, config, state["before"], played, [group for group in played if group.id in chosen])


def replay(
    record: Record, material: Material, until: int, digests: Sequence[Mapping[str, Any]] = ()
) -> Iterator[Finding]:
    """Execute the steps from the recorded one to the one of number `until`.

    digests: of the training's steps (`steps.jsonl`), to compare those without a record with. Steps behind the recorded
    one can be executed with the synchronous schedule only, since others depend on timing: raises InputError.
    """
    config = record.config
    if until > record.step and config.schedule != "synchronous":
        raise InputError(
            f"with the schedule {config.schedule} only recorded steps can be executed again; the last one before step "
            f"{until} is step {record.step}"
        )
    yield from surroundings(record)
    torch.set_num_threads(record.about["threads"])
    # every rank as many threads as the training's had, however many cores are here
    config = config.model_copy(update={"threads": record.about["threads"]})
    names = sorted(material.environments)
    with (
        tempfile.TemporaryDirectory(prefix="sparseline-replay-") as scratch,
        open_ranks(
            config.processes, Path(scratch), follow, config, material.checkpoint, names, material.longest
        ) as ranks,
    ):
        yield from _replay(record, config, material, until, digests, ranks)
        ranks.deal([None] * ranks.size)


def _replay(
    record: Record,
    config: PostTrainingConfig,
    material: Material,
    until: int,
    digests: Sequence[Mapping[str, Any]],
    ranks: Ranks,
) -> Iterator[Finding]:
    learner = Learner(config, material.model(), ranks)
    worker = RolloutWorker(config, learner.model, material.tokenizer, material.environments, material.longest, ranks)
    sampler = PromptSampler(material.tasks, config.group_size, f"{record.about['seed']}/post_training")
    learner.load_state(record.before["learner"])
    sampler.load_state(record.before["sampler"])
    rng = random.Random()
    rng.setstate(record.before["rng"])
    worker.load(learner.version)
    yield agreement(record, learner.model, worker.model, worker.engine.stop_token_id)
    flow, pool = Flow(config, sampler, Ledger()), LocalPool(worker)
    batches = synchronous(config, pool, flow, lambda: learner.version, record.step - 1)
    known = {record.step: record.about, **{one["step"]: one for one in digests}}
    for step in range(record.step - 1, until):
        number = step + 1
        if config.schedule == "synchronous":
            batch = next(batches)
        else:
            batch = Batch(record.trained, record.played, learner.version, [0] * len(record.trained))
        if number == record.step:
            if config.schedule == "synchronous":
                yield same_rollouts(record.played, batch.played)
            else:
                yield Finding(f"rollouts of step {number}", None, f"{config.schedule}: which weights play is timing's")
            # the update from the recorded rollouts, so that it is judged by itself
            batch = Batch(record.trained, record.played, learner.version, [0] * len(record.trained))
        learner.set_learning_rate(step)
        learned = learner.train(batch.groups, rng)
        if config.schedule == "synchronous":
            if learned:
                pool.publish(learner.version)
            if number > record.step:
                yield same_digest(f"rollouts of step {number}", rollouts_digest(batch.played), known, number)
        yield same_digest(f"weights after step {number}", weights_digest(learner.model), known, number)


def surroundings(record: Record) -> Iterator[Finding]:
    """What may keep a sound replay from being bitwise the same."""
    found = torch.__version__
    recorded = record.about["torch"]
    if found != recorded:
        yield Finding("torch", None, f"{recorded} trained, {found} is here: bits may differ")


def same_digest(name: str, found: str, known: Mapping[int, Mapping[str, Any]], number: int) -> Finding:
    """Compare a digest with the one that the training noted for the step of this number."""
    if number not in known:
        return Finding(name, None, f"sha256 {found[:16]}, the training's is not known")
    expected = known[number][name.split()[0]]
    return Finding(name, found == expected, f"sha256 {found[:16]}, recorded {expected[:16]}")


def same_rollouts(recorded: Sequence[PlayedGroup], found: Sequence[PlayedGroup]) -> Finding:
    """Whether the engine and the environments did the same again; otherwise the first difference."""
    name = "rollouts"
    if rollouts_digest(recorded) == rollouts_digest(found):
        tokens = sum(int(e.trajectory.sampled.sum()) for group in found for e in group.episodes if e.trajectory)
        episodes = sum(len(group.episodes) for group in found)
        return Finding(name, True, f"{episodes} episodes, {tokens} sampled tokens, bitwise the same")
    return Finding(name, False, first_difference(recorded, found))


def first_difference(recorded: Sequence[PlayedGroup], found: Sequence[PlayedGroup]) -> str:
    """Where two lists of played groups differ first, for a person."""
    ids = [[group.id for group in groups] for groups in (recorded, found)]
    if ids[0] != ids[1]:
        return f"other groups were played: {ids[0][:5]} recorded, {ids[1][:5]} now"
    for one, other in zip(recorded, found, strict=True):
        for index, (left, right) in enumerate(zip(one.episodes, other.episodes, strict=True)):
            place = f"group {one.id}, episode {index}"
            if left.trajectory is not None and right.trajectory is not None:
                size = min(len(left.trajectory), len(right.trajectory))
                for field in ("token_ids", "logprobs"):
                    sides = [getattr(side.trajectory, field)[:size] for side in (left, right)]
                    unlike = (sides[0] != sides[1]).nonzero().flatten()
                    if len(unlike):
                        at = int(unlike[0])
                        values = [side[at].item() for side in sides]
                        return f"{place}, token {at}: {field} {values[0]} recorded, {values[1]} now"
                if len(left.trajectory) != len(right.trajectory):
                    return f"{place}: {len(left.trajectory)} tokens recorded, {len(right.trajectory)} now"
                if not torch.equal(left.trajectory.routing, right.trajectory.routing):
                    at_ = (left.trajectory.routing != right.trajectory.routing).nonzero()[0].tolist()
                    return f"{place}, token {at_[1]}: other experts in MoE layer {at_[0]}"
            if (left.verdict.reward, left.ended) != (right.verdict.reward, right.ended):
                told = [f"{side.verdict.reward} ({side.ended})" for side in (left, right)]
                return f"{place}: reward {told[0]} recorded, {told[1]} now"
    return "sampling masks, seeds or faults differ"


def agreement(record: Record, model: Transformer, engine_model: Transformer, stop_token: int) -> Finding:
    """Whether the learner gives the recorded rollouts the engine's log-probabilities, with the weights of both."""
    name, worst = "engine against learner", 0.0
    version = record.about["version"]
    model.eval()
    for group in record.trained:
        for index, episode in enumerate(group.episodes):
            trajectory = episode.trajectory
            if trajectory is None or not bool(trajectory.sampled.any()):
                continue
            if bool((trajectory.weight_versions[trajectory.sampled] != version).any()):
                continue  # sampled by older weights, which are not recorded
            _, gap_R = gaps(model, trajectory, record.config)
            worst = max(worst, float(gap_R.max()))
            if not worst <= GAP:
                found = diverge(engine_model, model, trajectory, stop_token, record.config)
                return Finding(name, False, f"group {group.id}, episode {index}: {told(found, worst)}")
    return Finding(name, True, f"log-probabilities at most {worst:.1e} nats apart (bound {GAP:.0e})")


def told(found: Divergence | None, gap: float) -> str:
    """A divergence in a line."""
    if found is None:
        return f"{gap:.1e} nats apart in the batch, but not alone: rounding"
    layer = "" if found.layer is None else f", layer {found.layer}"
    return f"first apart at token {found.token}{layer}: {found.cause} ({found.detail})"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m components.post_training.replay", description=__doc__)
    parser.add_argument("--record", type=Path, required=True, help="folder of a recorded step")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of the task set")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint that RL started from")
    parser.add_argument("--steps", type=int, default=1, help="steps to execute, the recorded one among them")
    options = parser.parse_args(arguments)
    try:
        config = json.loads((options.record / ABOUT).read_text())["config"]
        base = parse_config(PostTrainingConfig, config, str(options.record / ABOUT))
        material = Material(options.tasks, options.checkpoint, base)
        record = read_record(options.record, material)
        findings = list(replay(record, material, record.step + options.steps - 1))
    except FileNotFoundError as error:
        print(f"{options.record} is no record of a step: {error}", file=sys.stderr)
        return 2
    except InputError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    print(json.dumps([asdict(finding) for finding in findings], indent=1))
    return 0 if all(finding.holds is not False for finding in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
