"""The stage as a program of its own, killed by SIGKILL with groups under way, and given again."""

import collections
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml
from ray.job_submission import JobSubmissionClient

from components.environments.chat_format import BOS, CHAT_TEMPLATE, END, PAD, SPECIAL_WORDS, UNKNOWN
from components.post_training.ledger import check_ledger, read_ledger
from components.runtime import ray_files
from components.runtime.artifacts import publish
from components.runtime.contracts import Pointer
from components.runtime.embedded_store import free_ports
from components.runtime.object_store import open_store
from components.runtime.ray_files import LogReader, Request
from components.runtime.task_set import write_task_set
from model import ModelConfig, Transformer
from model.checkpoint import save_model, save_tokenizer, word_tokenizer
from tests.cluster.control_plane import wait_for
from tests.components.post_training.ray_host import answers, start_head, stop_head

ROOT = Path(__file__).parents[3]
# A family as a plug-in of somebody else's: an installed package with an entry point. Its reward is decided by lot.
PLUGIN = """
from components.environments.kg_query import KnowledgeGraphQuery
from components.environments.protocol import Verdict


class Lot(KnowledgeGraphQuery):
    name = "lot"
    plays = 0

    def reset(self, task):
        episode, play = super().reset(task), self.plays
        self.plays += 1

        class Drawn:
            step, state_hash = episode.step, episode.state_hash

            def verdict(self):
                return Verdict(float(play % 2), "by lot")

        return Drawn()
"""
CONFIG = {
    **{"steps": 6, "prompts": 3, "group_size": 4, "mini_batches": 1, "validation_tasks": 1, "validation_every": 6},
    **{"turn_tokens": 6, "threads": 1, "learning_rate": 1e-3, "state_seconds": 0.0},
    **{"schedule": "asynchronous", "rollout_workers": 1},
}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "lot_family.py").write_text(PLUGIN)
    about = folder / "lot_family-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lot-family\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[sparseline.environments]\nlot = lot_family:Lot\n")
    return folder


@pytest.fixture(scope="module")
def family(plugin):
    spec = importlib.util.spec_from_file_location("lot_family", plugin / "lot_family.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lot()


@pytest.fixture
def program(tmp_path, plugin, family):
    """Starts the program; all of a test share store and runs. The environment is the test's own."""
    store = open_store(str(tmp_path / "store"))
    templates = family.templates()[::40]
    write_task_set(
        tmp_path / "tasks",
        tasks=[family.generate(t, s, split) for split in ("train", "validation") for s, t in enumerate(templates)],
        **{"long_tasks": [], "demonstrations": [], "documents": [], "vocabulary": family.vocabulary(), "battery": {}},
    )
    tokenizer = word_tokenizer(SPECIAL_WORDS, family.vocabulary(), UNKNOWN)
    model = ModelConfig.preset("micro", vocab_size=tokenizer.get_vocab_size())
    save_model(Transformer(model).initialise(0), tmp_path / "checkpoint")
    save_tokenizer(
        tokenizer, tmp_path / "checkpoint", chat_template=CHAT_TEMPLATE, bos=BOS, eos=END, pad=PAD, unknown=UNKNOWN
    )
    pointers = {
        name: publish(store, kind, tmp_path / name, stage="test", run={}).model_dump()
        for name, kind in (("tasks", "task-set"), ("checkpoint", "checkpoint"))
    }
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSELINE_", "AWS_", "RAY_"))}
    environment = {
        **keep,
        "SPARSELINE_STORE": str(tmp_path / "store"),
        "SPARSELINE_RUNS": str(tmp_path / "runs"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(plugin)]),
    }

    started = []

    def start(name: str, **values) -> subprocess.Popen:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({"config": {**CONFIG, **values}, "inputs": pointers, "seed": 3}))
        process = subprocess.Popen(
            [sys.executable, "-m", "components.post_training", "--config", str(file)],
            env={**environment, "SPARSELINE_RUN_ID": name},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    start.environment, start.pointers = environment, pointers
    yield start
    for process in started:
        process.kill()
        process.wait()


def stored_steps(store: Path) -> int:
    """How far the newest whole training state is."""
    found = store.glob("training-state/*/*/*/manifest.json")
    return max((int(path.parent.name) for path in found), default=0)


def after_steps(process: subprocess.Popen, store: Path, steps: int) -> None:
    """Wait until a training state of this many steps is whole."""
    deadline = time.monotonic() + 300
    while stored_steps(store) < steps:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no training state"
        select.select([], [], [], 0.02)  # between two looks at a folder


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_prompt_is_lost_or_trained_twice_when_it_is_killed(program, tmp_path):
    first = program("first")
    after_steps(first, tmp_path / "store", 2)
    family_tree = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    _, alive = psutil.wait_procs(family_tree, timeout=30)  # Ray's head has to see that its owner is gone
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    second = program("second")
    out, told = second.communicate(timeout=600)
    assert second.returncode == 0, told
    assert "goes on after step" in told
    assert "groups that were under way are played again" in told
    records = read_ledger(tmp_path / "runs" / "second" / "stages" / "post_training" / "artifacts" / "ledger.jsonl")
    check_ledger(records)
    ends = collections.Counter(r["group"] for r in records if r["event"] in ("trained", "dropped"))
    issued = [r["group"] for r in records if r["event"] == "issued"]
    assert sorted(issued) == list(range(len(issued)))
    assert ends == dict.fromkeys(issued, 1)
    again = [r["group"] for r in records if r["event"] == "again"]
    assert again
    assert len(set(again)) == len(again)
    reasons = {r["reason"] for r in records if r["event"] == "dropped"}
    assert reasons <= {"not needed", "too old", "zero variance"}
    steps = {r["step"] for r in records if r["event"] == "trained"}
    # new weights may reach a busy worker late; a batch of groups that are too old then teaches nothing
    assert steps == set(range(6)) or ("too old" in reasons and max(steps) > 2), sorted(steps)
    assert json.loads(out)["summary"]["ledger"]["hash"] == records[-1]["hash"]
    assert list((tmp_path / "store" / "training-state").rglob("*.json")) == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_another_configuration_begins_anew_and_says_why(program, tmp_path):
    values = {"schedule": "synchronous", "rollout_workers": 0}
    first = program("first", **values)
    after_steps(first, tmp_path / "store", 1)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    kept = sorted((tmp_path / "store" / "training-state").rglob("manifest.json"))
    second = program("second", **values, kl_weight=0.25)
    _, told = second.communicate(timeout=600)
    assert second.returncode == 0, told
    assert "begins anew, because the training state file://" in told
    assert "is another training's: config.kl_weight is 0.005 there, 0.25 here" in told
    assert sorted((tmp_path / "store" / "training-state").rglob("manifest.json")) == kept


def _ended(dashboard, name):
    return dashboard.get_job_status(name).is_terminal()


def _on_its_way(dashboard, store):
    return stored_steps(store) >= 2 or _ended(dashboard, "first")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_post_training_goes_on_after_its_whole_ray_cluster_was_lost(program, tmp_path):
    """As KubeRay submits it: by HTTP to the dashboard of a head that is killed with all it runs, then to another."""
    store = open_store(str(tmp_path / "store"))
    inputs = {name: Pointer.model_validate(value) for name, value in program.pointers.items()}
    request = Request(run_id="run", stage="post_training", config=CONFIG, seed=3, inputs=inputs)
    uri = ray_files.write_request(store, request)
    entrypoint = f"python -m components.runtime.ray_stage --request {uri}"
    (port,) = free_ports(1)
    for attempt in ("first", "second"):
        folder = Path(tempfile.mkdtemp(prefix="rayhead-", dir="/tmp"))
        head = start_head(folder, "127.0.0.1", port, {**program.environment, "SPARSELINE_MIRRORED": "1"})
        try:
            wait_for(lambda: answers("127.0.0.1", port), "a Ray head answering", 300)
            dashboard = JobSubmissionClient(f"http://127.0.0.1:{port}")
            dashboard.submit_job(entrypoint=entrypoint, submission_id=attempt)
            if attempt == "first":
                wait_for(partial(_on_its_way, dashboard, tmp_path / "store"), "two steps", 300)
                assert not _ended(dashboard, attempt), dashboard.get_job_logs(attempt)
                continue
            wait_for(partial(_ended, dashboard, "second"), "its end", 300)
            log = dashboard.get_job_logs(attempt)
            assert dashboard.get_job_status(attempt) == "SUCCEEDED", log
        finally:
            stop_head(head, folder)
    assert "goes on after step" in log
    result = ray_files.read_result(store, uri)
    assert result.record["summary"]["ledger"]["trained"] > 0
    lines = []
    LogReader(store, uri, lines.append).pump()
    assert lines[-1].startswith("[post_training] ")
    assert sum("goes on after step" in line for line in lines) == 1
