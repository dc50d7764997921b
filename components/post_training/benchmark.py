"""Rollouts and updates per second of the schedules, on the same work.

    python -m components.post_training.benchmark --tasks DIR --checkpoint DIR \
        --output components/post_training/results/schedules.json

Each schedule plays and trains the same number of batches from the same checkpoint, without validation: synchronous in
one process with 1 and with 2 threads, synchronous in two data-parallel processes, and one step off and asynchronous
with one rollout worker, or two, and the learner, 1 thread each. Rounds take turns, so that what else
the machine does meets all alike. Starting processes and Ray is not counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptSampler
from components.post_training.flow import Flow
from components.post_training.ledger import Ledger, check_ledger
from components.post_training.measurements import PACKAGES, Material
from components.post_training.run import follow, open_pool
from components.post_training.schedule import SCHEDULES, Pool
from components.post_training.trainer import Learner
from components.post_training.worker import RolloutWorker
from components.runtime.errors import InputError, exit_code
from components.runtime.ranks import open_ranks
from components.runtime.result_file import frame
from components.runtime.stage import write_json

CASES: dict[str, dict[str, Any]] = {
    "synchronous, 1 thread": {"threads": 1},
    "synchronous, 2 threads": {"threads": 2},
    "synchronous, 2 processes": {"threads": 1, "processes": 2},
    "one step off, 1 + 1 threads": {"threads": 1, "schedule": "one_step_off", "rollout_workers": 1},
    "asynchronous, 1 + 1 threads": {"threads": 1, "schedule": "asynchronous", "rollout_workers": 1},
    "asynchronous, 2 + 1 threads": {"threads": 1, "schedule": "asynchronous", "rollout_workers": 2},
}


def measure(material: Material, config: PostTrainingConfig, directory: Path) -> dict[str, float]:
    """Play and train all steps once; seconds, and what was done in them."""
    torch.set_num_threads(config.threads)
    names = sorted(material.environments)
    with open_ranks(config.processes, directory, follow, config, material.checkpoint, names, material.longest) as ranks:
        learner = Learner(config, material.model(), ranks)
        playing = (material.tokenizer, material.environments, material.longest)
        worker = RolloutWorker(config, learner.model, *playing, ranks)
        ledger = Ledger()
        sampler = PromptSampler(material.tasks, config.group_size, "benchmark")
        with open_pool(config, directory / "ray", worker, *playing) as pool:
            # what is done once in a process (imports, buffers) is not what is measured
            pool.submit(sampler.take(config.processes))
            warm = pool.collect()
            for samples in learner.samples(warm, random.Random(0)):
                learner.accumulate(samples)
            learner.optimizer.zero_grad(set_to_none=True)
            values = run_steps(config, learner, pool, Flow(config, sampler, ledger), ledger)
        ranks.deal([None] * ranks.size)
    return values


def run_steps(config: PostTrainingConfig, learner: Learner, pool: Pool, flow: Flow, ledger: Ledger) -> dict[str, float]:
    rng = random.Random(0)
    rollouts = updates = 0
    staleness: list[int] = []
    started = time.monotonic()
    for step, batch in enumerate(SCHEDULES[config.schedule](config, pool, flow, lambda: learner.version)):
        learner.set_learning_rate(step)
        updates += bool(learner.train(batch.groups, rng))
        flow.trained(batch, step)
        pool.publish(learner.version)
        rollouts += sum(len(group.episodes) for group in batch.played)
        staleness += batch.staleness
    seconds = time.monotonic() - started
    ledger.close("not needed")
    check_ledger(ledger.records)
    return {
        "seconds": round(seconds, 2),
        "rollouts": rollouts,
        "updates": updates,
        "trained_rollouts": sum(record["event"] == "trained" for record in ledger.records) * config.group_size,
        "staleness": round(statistics.fmean(staleness), 2) if staleness else 0.0,
        "rollouts_per_second": round(rollouts / seconds, 2),
        "updates_per_second": round(updates / seconds, 3),
    }


def summarise(rounds: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row per schedule: medians over the rounds, and the speed-up over the faster synchronous one in each round."""
    synchronous = [
        found for name, found in rounds.items() if "schedule" not in CASES[name] and "processes" not in CASES[name]
    ]
    faster = [max(one["rollouts_per_second"] for one in round_) for round_ in zip(*synchronous, strict=True)]
    rows = []
    for name, found in rounds.items():
        medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
        ratios = [one["rollouts_per_second"] / best for one, best in zip(found, faster, strict=True)]
        rows.append(
            {
                "schedule": name,
                **medians,
                "against_the_faster_synchronous": round(statistics.median(ratios), 3),
                "in_each_round": [round(ratio, 3) for ratio in ratios],
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m components.post_training.benchmark", description=__doc__)
    parser.add_argument("--tasks", type=Path, required=True, help="folder of a task set")
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint to start from")
    parser.add_argument("--steps", type=int, default=16, help="batches of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each schedule")
    parser.add_argument("--output", type=Path, required=True, help="result file (JSON)")
    options = parser.parse_args(arguments)
    base = PostTrainingConfig(steps=options.steps)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    try:
        material = Material(options.tasks, options.checkpoint, base)
        for _ in range(options.rounds):
            for name, values in CASES.items():
                config = PostTrainingConfig.model_validate({**base.model_dump(), **values})
                with tempfile.TemporaryDirectory() as directory:
                    rounds[name].append(measure(material, config, Path(directory)))
                print(f"{name}: {rounds[name][-1]}", flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    command = (
        "python -m components.post_training.benchmark --tasks DIR --checkpoint DIR "
        f"--steps {options.steps} --rounds {options.rounds} --output FILE"
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, {**frame(command, PACKAGES), "rows": summarise(rounds)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
