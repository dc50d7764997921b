"""What each stabiliser is worth: the RL stage alone, with one of them off, several seeds.

    python -m components.post_training.ablations --tasks DIR --checkpoint DIR --steps 60 --seeds 0 1 2 \
        --output components/post_training/results/ablations.json

The rollout engine computes in bfloat16 and the learner in float32, so that the two never agree exactly. A row is one
variant with one seed; rows that the output already holds for the same settings are kept, so that a stopped run goes on.
--tasks and --checkpoint take one folder, or one for each seed. The columns:

- ratio_bias: mean over tokens of pi / pi_engine, less 1, before a batch's first update; 0 where both are one policy.
- ratio_spread: the largest deviation of that ratio from 1, mean over batches.
- gradient_variance: of a batch's gradient, from its two halves at the same weights, over its squared length.
- masked_share: of sequences, by the off-policy sequence mask.
- pass_at_1_before, pass_at_1: sampled, on the validation split, with a float32 engine; final weights, not the best.
- pass_at_1_cool, pass_at_1_greedy: the same at temperature 0.3 and greedily. A policy that has merely become surer of
  what it would have said anyway gains at temperature 1 and not there.
- entropy: nats per sampled token, mean of the last five batches.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import multiprocessing
import random
import shlex
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptSampler
from components.post_training.flow import Batch, Flow
from components.post_training.ledger import Ledger, check_ledger
from components.post_training.measurements import PACKAGES, Material
from components.post_training.schedule import LocalPool, synchronous
from components.post_training.trainer import Learner
from components.post_training.validation import validate
from components.post_training.worker import RolloutWorker
from components.runtime.contracts import digest
from components.runtime.errors import InputError, exit_code
from components.runtime.processes import die_with_parent, threads_of_each
from components.runtime.result_file import frame
from components.runtime.stage import parse_config, read_yaml, write_json

BASE, STALE, NUCLEUS = "all stabilisers", "all stabilisers, 4 steps stale", "all stabilisers, top-p 0.9"
# variant: (what it is compared with, values of the configuration, steps of staleness, random tie-breaks)
VARIANTS: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    BASE: ("", {}, 0, False),
    "biased KL": (BASE, {"kl_estimator": "biased"}, 0, False),
    "no routing replay": (BASE, {"keep_routing": False}, 0, False),
    "random tie-breaks": (BASE, {}, 0, True),
    "rejection-sampling fine-tuning": (BASE, {"objective": "rft"}, 0, False),
    STALE: (BASE, {}, 4, False),
    "no sequence masking, 4 steps stale": (STALE, {"sequence_mask_threshold": None}, 4, False),
    NUCLEUS: (BASE, {"top_p": 0.9}, 0, False),
    "no mask replay, top-p 0.9": (NUCLEUS, {"top_p": 0.9, "keep_sampling_masks": False}, 0, False),
}
COLUMNS = (
    "ratio_bias",
    "ratio_spread",
    "gradient_variance",
    "masked_share",
    "entropy",
    "pass_at_1_before",
    "pass_at_1",
    "pass_at_1_cool",
    "pass_at_1_greedy",
)
DIFFERENCES = {"difference": "pass_at_1", "difference_cool": "pass_at_1_cool", "difference_greedy": "pass_at_1_greedy"}
COOL = 0.3  # the temperature that validation mostly finds best for the policy before RL
GRADIENT_EVERY = 5  # batches between two measurements of the gradient's variance
# two-sided 95% quantiles of Student's t, by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


class LaggingPool(LocalPool):
    """Plays with the weights from `steps` versions ago, or the first ones. The worker needs weights of its own."""

    def __init__(self, worker: RolloutWorker, steps: int) -> None:
        super().__init__(worker)
        self._history: deque[tuple[int, dict[str, torch.Tensor]]] = deque(maxlen=steps + 1)
        self._remember(0)

    def _remember(self, version: int) -> None:
        self._history.append((version, copy.deepcopy(self.worker.source.state_dict())))

    def publish(self, version: int) -> None:
        self._remember(version)
        self.worker.load(*self._history[0])


def gradient_variance(learner: Learner, batch: Batch, rng: random.Random) -> float | None:
    """Variance of the batch's gradient over its squared length; None for fewer than two groups.

    With the gradients g1, g2 of two random halves, |g1 - g2|^2 / 4 estimates the variance of their mean.
    """
    groups = list(batch.groups)
    rng.shuffle(groups)
    halves = []
    for half in (groups[::2], groups[1::2]):
        samples = [sample for part in learner.samples(half, rng) for sample in part]
        if not samples:
            return None
        if learner.config.importance_cap is not None:
            learner.record_proximal(samples)
        learner.model.train()
        learner.accumulate(samples)
        halves.append(torch.cat([p.grad.flatten() for p in learner.trained if p.grad is not None]))
        learner.optimizer.zero_grad(set_to_none=True)
    mean = (halves[0] + halves[1]) / 2
    return float((halves[0] - halves[1]).square().sum() / 4 / mean.square().sum().clamp(min=1e-30))


def row(material: Material, variant: str, seed: int, base: PostTrainingConfig) -> dict[str, Any]:
    """Train one variant with one seed."""
    _, values, lag, ties = VARIANTS[variant]
    config = PostTrainingConfig.model_validate({**base.model_dump(), "rollout_dtype": "bfloat16", **values})
    torch.manual_seed(seed)
    learner = Learner(config, material.model())
    worker = RolloutWorker(config, learner.model, material.tokenizer, material.environments, material.longest)
    exact = config.model_copy(update={"rollout_dtype": "float32", "temperature": 1.0, "top_p": 1.0})
    validator = RolloutWorker(exact, learner.model, material.tokenizer, material.environments, material.longest)
    if ties:
        worker.engine.tie_generator = torch.Generator().manual_seed(seed)
    ledger = Ledger()
    flow = Flow(config, PromptSampler(material.tasks, config.group_size, f"{seed}/ablations"), ledger)
    pool = LaggingPool(worker, lag)
    rng, aside = random.Random(f"{seed}/update"), random.Random(f"{seed}/gradient")

    def pass_at_1(temperature: float) -> float:
        validator.policy.sampling = dataclasses.replace(validator.policy.sampling, temperature=temperature)
        return validate(validator, material.validation).macro

    before = pass_at_1(1.0)
    learned: list[dict[str, float]] = []
    variances: list[float] = []
    rewards: list[float] = []
    stopped = ""
    for step, batch in enumerate(synchronous(config, pool, flow, lambda: learner.version)):
        rewards += [episode.verdict.reward for group in batch.played if not group.fault for episode in group.episodes]
        if step % GRADIENT_EVERY == 0 and (variance := gradient_variance(learner, batch, aside)) is not None:
            variances.append(variance)
        learner.set_learning_rate(step)
        try:
            values_ = learner.train(batch.groups, rng)
        except FloatingPointError as error:
            stopped = str(error)
            break
        flow.trained(batch, step)
        if values_:
            learned.append(values_)
            pool.publish(learner.version)
    ledger.close(f"stopped: {stopped}" if stopped else "not needed")
    counts = check_ledger(ledger.records)
    ages = [record["staleness"] for record in ledger.records if record["event"] == "trained"]

    def mean(found: Sequence[float]) -> float | None:
        return statistics.fmean(found) if found else None

    return {
        "variant": variant,
        "seed": seed,
        "ratio_bias": mean([one["ratio_bias"] for one in learned]),
        "ratio_spread": mean([math.expm1(one["logprob_gap"]) for one in learned]),
        "gradient_variance": mean(variances),
        "masked_share": mean([one["masked_share"] for one in learned]),
        "pass_at_1_before": before,
        "pass_at_1": pass_at_1(1.0),
        "pass_at_1_cool": pass_at_1(COOL),
        "pass_at_1_greedy": pass_at_1(0.0),
        "reward": mean(rewards),
        "kl": mean([one["kl"] for one in learned[-5:]]),
        "entropy": mean([one["entropy"] for one in learned[-5:]]),
        "staleness": mean(ages),
        "groups": counts,
        "stopped": stopped,
    }


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per variant: means over the seeds, and the differences of pass@1 to what it is compared with.

    The intervals are Student's, over the differences of the same seeds; "null" where it holds 0 or there is only one.
    """
    lines = []
    for variant, (other, *_) in VARIANTS.items():
        own = {one["seed"]: one for one in rows if one["variant"] == variant}
        if not own:
            continue
        line: dict[str, Any] = {"variant": variant, "compared_with": other, "seeds": sorted(own)}
        for column in COLUMNS:
            found = [one[column] for one in own.values() if one[column] is not None]
            line[column] = round(statistics.fmean(found), 6) if found else None
        base = {one["seed"]: one for one in rows if one["variant"] == other}
        both = sorted(own.keys() & base.keys())
        for name, column in DIFFERENCES.items():
            if both:
                line[name] = interval([own[seed][column] - base[seed][column] for seed in both])
        lines.append(line)
    return lines


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of the values and its 95% interval; without an interval for one value."""
    middle = statistics.fmean(values)
    found: dict[str, Any] = {"mean": round(middle, 4), "n": len(values), "effect": "null"}
    if len(values) > 1:
        quantile = STUDENT.get(len(values) - 1, 1.96)
        half = quantile * statistics.stdev(values) / math.sqrt(len(values))
        found.update(low=round(middle - half, 4), high=round(middle + half, 4))
        if abs(middle) > half:
            found["effect"] = "higher" if middle > 0 else "lower"
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m components.post_training.ablations", description=__doc__)
    parser.add_argument("--tasks", type=Path, nargs="+", required=True, help="folder of a task set, or one per seed")
    parser.add_argument(
        "--checkpoint", type=Path, nargs="+", required=True, help="folder of the start, or one per seed"
    )
    parser.add_argument("--config", type=Path, help="YAML with values of the post-training configuration")
    parser.add_argument("--steps", type=int, default=60, help="rollout batches")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--processes", type=int, default=1, help="rows made side by side")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads of each; 0 = its share of the cores")
    parser.add_argument("--output", type=Path, required=True, help="result file (JSON), gone on with where it exists")
    options = parser.parse_args(arguments)
    try:
        run(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    return 0


def run(options: argparse.Namespace) -> None:
    seeds = options.seeds
    for name in ("tasks", "checkpoint"):
        if len(getattr(options, name)) not in (1, len(seeds)):
            raise InputError(f"--{name} takes one folder or one for each of the {len(seeds)} seeds")
    values = {**(read_yaml(options.config) if options.config else {}), "steps": options.steps}
    base = parse_config(PostTrainingConfig, values, str(options.config or "the configuration"))
    rows = kept_rows(options.output)
    jobs = []
    for index, seed in enumerate(seeds):
        tasks, checkpoint = (found[index % len(found)] for found in (options.tasks, options.checkpoint))
        Material(tasks, checkpoint, base)  # what does not fit together is told now
        for variant in options.variants:
            settings = digest([base.model_dump(mode="json"), VARIANTS[variant], identity(tasks), identity(checkpoint)])
            if not any((one["variant"], one["seed"], one["settings"]) == (variant, seed, settings) for one in rows):
                jobs.append(Job(tasks, checkpoint, variant, seed, base, settings))
    changed = base.model_dump(mode="json", exclude_defaults=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for made in made_rows(jobs, options.processes, options.threads):
        rows = [one for one in rows if (one["variant"], one["seed"]) != (made["variant"], made["seed"])] + [made]
        result = {"configuration": changed, "table": table(rows), "rows": rows}
        write_json(options.output, {**frame(command(options), PACKAGES), **result})
        print(json.dumps({name: made[name] for name in ("variant", "seed", *COLUMNS, "seconds")}), flush=True)


@dataclasses.dataclass(frozen=True)
class Job:
    """A row to be made. settings: digest of what it depends on."""

    tasks: Path
    checkpoint: Path
    variant: str
    seed: int
    base: PostTrainingConfig
    settings: str

    def __call__(self) -> dict[str, Any]:
        started = time.monotonic()
        made = row(Material(self.tasks, self.checkpoint, self.base), self.variant, self.seed, self.base)
        return {**made, "settings": self.settings, "seconds": round(time.monotonic() - started, 1)}


def made_rows(jobs: Sequence[Callable[[], dict[str, Any]]], processes: int, threads: int) -> Iterator[dict[str, Any]]:
    """Rows as they are ready, `processes` made side by side."""
    # More threads than cores wait for each other: rows took ten times as long.
    threads = threads_of_each(threads, processes)
    if processes == 1:
        _begin(threads)
        yield from (job() for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _begin_worker, (threads,)) as pool:
        try:
            for future in as_completed([pool.submit(job) for job in jobs]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)


def _begin_worker(threads: int) -> None:
    die_with_parent()
    _begin(threads)


def command(options: argparse.Namespace) -> str:
    chosen = [] if options.variants == list(VARIANTS) else ["--variants", *options.variants]
    return shlex.join(
        ["python", "-m", "components.post_training.ablations", "--tasks", "DIR", "--checkpoint", "DIR"]
        + (["--config", "FILE"] if options.config else [])
        + ["--steps", str(options.steps), "--seeds", *map(str, options.seeds), *chosen, "--output", "FILE"]
    )


def identity(directory: Path) -> str:
    """What tells one published folder from another: its manifest, or else its path."""
    manifest = directory / "manifest.json"
    return digest(manifest.read_text()) if manifest.is_file() else str(directory.resolve())


def kept_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a result file, [] where there is none. Raises InputError for a file that is none of ours."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())["rows"]
        return [one for one in rows if {"variant", "seed", "settings", *COLUMNS} <= set(one)]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no result of this command ({error!r}); choose another --output") from error


if __name__ == "__main__":
    sys.exit(main())
