"""Ablations and benchmark: the estimates against closed forms, rows that are kept, a real small run."""

import json
import math
import random
from functools import partial

import pytest
import torch

from components.post_training import ablations, benchmark, measurements
from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptSampler
from components.post_training.flow import Flow
from components.post_training.ledger import Ledger
from components.post_training.measurements import Material
from components.post_training.schedule import LocalPool, synchronous
from components.post_training.trainer import Learner
from components.post_training.worker import RolloutWorker
from components.runtime.errors import InputError

CONFIG = PostTrainingConfig(
    prompts=4, group_size=2, turn_tokens=6, validation_tasks=2, steps=1, rollout_dtype="bfloat16"
)


@pytest.fixture
def material(inputs, lot, monkeypatch) -> Material:
    monkeypatch.setattr(measurements, "installed", lambda names: {name: lot(name) for name in names})
    return Material(inputs.folder / "tasks", inputs.folder / "checkpoint", CONFIG)


def test_interval_by_hand():
    # mean 2, standard deviation 1, t(2) = 4.303
    got = ablations.interval([1.0, 2.0, 3.0])
    half = 4.303 / math.sqrt(3)
    assert got == {"mean": 2.0, "n": 3, "low": round(2 - half, 4), "high": round(2 + half, 4), "effect": "null"}
    assert ablations.interval([2.0, 2.01, 2.02])["effect"] == "higher"
    assert ablations.interval([-2.0, -2.01, -2.02])["effect"] == "lower"
    assert ablations.interval([5.0]) == {"mean": 5.0, "n": 1, "effect": "null"}


@pytest.mark.slow
def test_a_lagging_pool_plays_old_weights(material):
    learner = Learner(CONFIG, material.model())
    worker = RolloutWorker(CONFIG, learner.model, material.tokenizer, material.environments, material.longest)
    pool = ablations.LaggingPool(worker, 2)
    head, seen = learner.model.lm_head.weight, []
    sampler = PromptSampler(material.tasks, 2, "x")
    for version in range(1, 5):
        with torch.no_grad():
            head.fill_(version)
        pool.publish(version)
        pool.submit(sampler.take(1))
        (played,) = pool.collect()
        seen.append((played.version, float(worker.model.lm_head.weight[0, 0])))
    assert [version for version, _ in seen] == [0, 0, 1, 2]
    assert [value for _, value in seen][2:] == [1.0, 2.0]


def test_gradient_variance_from_the_gradients_of_the_halves(material):
    learner = Learner(CONFIG, material.model())
    worker = RolloutWorker(CONFIG, learner.model, material.tokenizer, material.environments, material.longest)
    flow = Flow(CONFIG, PromptSampler(material.tasks, 2, "x"), Ledger())
    batch = next(synchronous(CONFIG, LocalPool(worker), flow, lambda: 0))
    before = [p.detach().clone() for p in learner.trained]
    got = ablations.gradient_variance(learner, batch, random.Random(5))
    assert all(torch.equal(p, old) for p, old in zip(learner.trained, before, strict=True))
    order = list(batch.groups)
    random.Random(5).shuffle(order)
    halves = []
    for half in (order[::2], order[1::2]):
        learner.accumulate([s for part in learner.samples(half, random.Random(0)) for s in part])
        halves.append(torch.cat([p.grad.flatten().double() for p in learner.trained if p.grad is not None]))
        learner.optimizer.zero_grad()
    both = torch.stack(halves)
    # the unbiased variance of two values, over two, is that of their mean
    want = both.var(dim=0).sum() / 2 / both.mean(dim=0).square().sum()
    assert got == pytest.approx(float(want), rel=1e-3)
    batch.groups = batch.groups[:1]
    assert ablations.gradient_variance(learner, batch, random.Random(0)) is None


@pytest.mark.slow
def test_rows_that_are_there_are_kept_and_missing_ones_are_made(tmp_path, inputs, material, capsys):
    output, values = tmp_path / "ablations.json", tmp_path / "values.yaml"
    values.write_text("{prompts: 2, group_size: 2, turn_tokens: 6, validation_tasks: 2}")

    def run(*variants, steps=2):
        folder = inputs.folder
        places = ["--tasks", str(folder / "tasks"), "--checkpoint", str(folder / "checkpoint"), "--config", str(values)]
        amounts = ["--steps", str(steps), "--seeds", "0", "--threads", "1", "--output", str(output)]
        code = ablations.main([*places, *amounts, "--variants", *variants])
        assert code == 0, capsys.readouterr().err
        return json.loads(output.read_text())

    first = run("all stabilisers")
    both = run("all stabilisers", "no sequence masking, 4 steps stale")
    assert both["rows"][0] == first["rows"][0]
    assert [one["variant"] for one in both["table"]] == ["all stabilisers", "no sequence masking, 4 steps stale"]
    assert both["rows"][1]["staleness"] == 0.5  # of two batches the second is one version old
    assert both["rows"][0]["groups"]["trained"] == 4
    assert both["configuration"] == {
        "prompts": 2, "group_size": 2, "turn_tokens": 6, "validation_tasks": 2, "steps": 2
    }  # fmt: skip
    lines = {one["variant"]: one for one in both["table"]}
    assert lines["no sequence masking, 4 steps stale"].get("difference") is None  # what it is compared with is missing
    again = run("all stabilisers", steps=1)  # other settings: made anew
    assert again["rows"][-1]["settings"] != first["rows"][0]["settings"]
    output.write_text("[]")
    with pytest.raises(InputError, match="is no result of this command"):
        ablations.kept_rows(output)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_rows_are_made_side_by_side_and_a_failed_one_ends_all(processes):
    jobs = [partial(dict, seed=seed) for seed in range(3)]
    assert sorted(made["seed"] for made in ablations.made_rows(jobs, processes, 1)) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        list(ablations.made_rows([partial(divmod, 1, 0)], processes, 1))


@pytest.mark.slow
def test_benchmark_counts_the_work_and_compares_with_the_faster_synchronous(tmp_path, material):
    config = PostTrainingConfig(prompts=2, group_size=2, turn_tokens=6, steps=2, threads=1)
    got = benchmark.measure(material, config, tmp_path)
    assert (got["rollouts"], got["updates"], got["trained_rollouts"]) == (8, 2, 8)
    names = list(benchmark.CASES)
    # data-parallel processes count as no synchronous peer
    speeds_of_cases = ([4.0, 6.0], [5.0, 3.0], [8.0, 9.0], [6.0, 6.0], [7.5, 9.0], [10.0, 12.0])
    rounds = {
        name: [{**got, "rollouts_per_second": speed} for speed in speeds]
        for name, speeds in zip(names, speeds_of_cases, strict=True)
    }
    rows = benchmark.summarise(rounds)
    told = [[0.8, 1.0], [1.0, 0.5], [1.6, 1.5], [1.2, 1.0], [1.5, 1.5], [2.0, 2.0]]
    assert [row["in_each_round"] for row in rows] == told
    assert rows[4]["against_the_faster_synchronous"] == 1.5
