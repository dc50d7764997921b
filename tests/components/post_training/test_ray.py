"""Rollout workers as Ray actors: real clusters, real deaths."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from components.post_training import ray_cluster
from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptSampler
from components.post_training.ledger import check_ledger, read_ledger
from components.runtime.errors import InputError
from components.runtime.task_set import read_tasks
from components.runtime.tracking import read_metrics
from model.checkpoint import load_model, load_tokenizer

ROOT = Path(__file__).parents[3]


def ledger_of(folder):
    return read_ledger(folder / "records" / "artifacts" / "ledger.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_synchronous_in_an_actor_is_what_it_is_in_this_process(head, train, dtype):
    values = {"validation_every": 1, "rollout_dtype": dtype}
    (here, a), (there, b) = train("here", **values), train("there", rollout_workers=1, **values)
    # the lot's plays start with the validation here, and in an actor of its own there: the rewards are the same
    first, second = (load_model(folder / "work" / "checkpoint").state_dict() for folder in (a, b))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {**here.summary, "ledger": 0} == {**there.summary, "ledger": 0}
    assert there.summary["logprob_gap"] < (1e-4 if dtype == "float32" else 0.2)


@pytest.mark.slow
def test_one_step_off_does_not_depend_on_timing(head, train):
    (first, a), (second, b) = (
        train(name, schedule="one_step_off", rollout_workers=2, refills=1) for name in ("first", "second")
    )
    assert first.summary == second.summary
    assert ledger_of(a) == ledger_of(b)
    counts = check_ledger(ledger_of(a))
    assert counts["trained"] == 9
    ages = [record["staleness"] for record in ledger_of(a) if record["event"] == "trained"]
    assert ages == [0] * 3 + [1] * 6


@pytest.mark.slow
def test_asynchronous_keeps_the_bound_and_a_hanging_environment_spoils_only_its_groups(head, train, lot):
    def reward(play):
        if play == 7:
            time.sleep(600)
        return float(play % 2)

    result, folder = train(
        environment=lot(reward=reward),
        steps=5,
        schedule="asynchronous",
        rollout_workers=1,
        environment_workers=1,
        environment_seconds=5.0,  # far more than a sound call takes, also on a busy machine
        validation_tasks=1,
    )
    records = ledger_of(folder)
    counts = check_ledger(records)
    assert counts["dropped_faulty"] == 1
    assert any("environment_hangs: verdicts took more than 5 s" in record.get("reason", "") for record in records)
    assert all(record["staleness"] <= 2 for record in records if record["event"] == "trained")
    assert result.summary["staleness_max"] >= 1
    assert len(read_metrics(folder / "records")["rl/staleness"]) == 5


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_its_groups_are_played(head, tmp_path, inputs, lot):
    with ray_cluster.cluster(tmp_path / "ray", {"CPU": 1}):
        import ray

        from components.post_training.ray_pool import RayPool

        tasks_folder, start = inputs.folder / "tasks", inputs.folder / "checkpoint"
        tasks = read_tasks(tasks_folder, "train")
        config = PostTrainingConfig(prompts=2, group_size=2, turn_tokens=6, rollout_workers=1)
        pool = RayPool(config, load_model(start), load_tokenizer(start), {"kg_query": lot()}, 160)
        pool.publish(3)
        pool.submit(PromptSampler(tasks, 2, "x").take(2))
        ray.kill(pool.workers[0])
        played = pool.collect()
        assert [group.id for group in played] == [0, 1]
        assert all(group.version == 3 and len(group.episodes) == 2 and not group.fault for group in played)
        assert pool.collect() == []


def test_missing_resources_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = PostTrainingConfig(rollout_workers=500, worker_threads=2, environment_workers=1)
    with (
        pytest.raises(InputError, match=r"this machine does not have .*: 1250 CPU \(there are \d+\).*rollout_workers"),
        ray_cluster.cluster(tmp_path, ray_cluster.resources(config)),
    ):
        pass
    with pytest.raises(InputError, match=r"1 GPU \(there are 0\)"):
        ray_cluster.require({"CPU": 1, "GPU": 1}, {"CPU": 4.0}, "the cluster")


def test_an_address_where_nothing_answers_is_bad_input(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with (
        pytest.raises(InputError, match=r"nothing answers at RAY_ADDRESS 127.0.0.1:9"),
        ray_cluster.cluster(tmp_path, {}),
    ):
        pass


@pytest.mark.slow
def test_a_given_cluster_without_the_resources_is_bad_input(head, tmp_path):
    with (
        pytest.raises(InputError, match=r"the Ray cluster at .* 9 CPU \(there are 4\)"),
        ray_cluster.cluster(tmp_path, {"CPU": 9}),
    ):
        pass


@pytest.mark.slow
def test_what_ray_started_ends_with_its_process_even_by_sigkill(tmp_path):
    program = f"""
        import time
        from pathlib import Path
        from components.post_training.ray_cluster import cluster
        with cluster(Path({str(tmp_path / "ray")!r}), {{"CPU": 1}}):
            import ray
            @ray.remote(num_cpus=1)
            class Actor:
                def ready(self):
                    return True
            actor = Actor.remote()
            print(ray.get(actor.ready.remote()), flush=True)
            time.sleep(600)
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("raylet" in child.name() for child in children)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert [child for child in alive if child.status() != psutil.STATUS_ZOMBIE] == []
