"""The stage inside a RayJob and what it tells through the store: real processes, a directory and a real SeaweedFS."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.runtime import ray_files
from components.runtime.errors import InputError
from components.runtime.object_store import DirectoryStore, S3Store
from components.runtime.ray_files import LogReader, LogWriter, Request, Result

ROOT = Path(__file__).parents[3]
EXAMPLE = "tests.components.runtime.counting_stage"


@pytest.fixture(params=["directory", "seaweed"])
def store(request, tmp_path):
    if request.param == "directory":
        return DirectoryStore(tmp_path / "store")
    seaweed = request.getfixturevalue("seaweed")
    return S3Store(f"{seaweed.uri}/{tmp_path.name}", seaweed.endpoint, seaweed.access_key, seaweed.secret_key)


def request(**config):
    return Request(
        run_id="run-1",
        stage="example",
        config=config,
        seed=7,
        inputs={},
        run=f"{EXAMPLE}:run",
        config_class=f"{EXAMPLE}:Config",
    )


def start(store, uri, folder):
    environment = {**os.environ, "SPARSELINE_RUNS": str(folder / "runs"), "SPARSELINE_MIRRORED": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "nowhere:1", "SPARSELINE_STORE": store.uri}
    if isinstance(store, S3Store):
        keys = {"AWS_ACCESS_KEY_ID": store.access_key, "AWS_SECRET_ACCESS_KEY": store.secret_key}
        environment |= {"SPARSELINE_S3_ENDPOINT": store.endpoint, **keys}
    command = [sys.executable, "-m", "components.runtime.ray_stage", "--request", uri]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def log(store, uri):
    lines = []
    LogReader(store, uri, lines.append).pump()
    return lines


def steps(lines):
    return [int(line.rsplit(" ", 1)[1]) for line in lines if "] step " in line]


@pytest.mark.slow
def test_a_stage_leaves_its_result_and_every_line_of_its_log_in_order(store, tmp_path):
    uri = ray_files.write_request(store, request(steps=5, seconds=0.01))
    stage = start(store, uri, tmp_path)
    assert stage.wait(60) == 0, stage.stdout.read()
    result = ray_files.read_result(store, uri)
    assert result.record["summary"] == {"steps": 5, "resumed": 0}
    assert result.record["outputs"]["count"]["kind"] == "checkpoint"
    assert steps(log(store, uri)) == [1, 2, 3, 4, 5]
    assert log(store, uri) == []  # what was handed on is gone
    assert start(store, uri, tmp_path).wait(60) == 0  # submitted again after its success: nothing runs
    assert log(store, uri) == []
    ray_files.remove(store, ray_files.folder("run-1", "example"))
    assert store.keys(f"{ray_files.FOLDER}/") == []


@pytest.mark.slow
def test_a_stopped_attempt_leaves_no_result_and_the_next_goes_on(tmp_path):
    store = DirectoryStore(tmp_path / "store")
    uri = ray_files.write_request(store, request(steps=12, seconds=0.3))
    first = start(store, uri, tmp_path / "a")
    while not any("] step 4" in line for line in iter(lambda: first.stdout.readline().decode(), "")):
        pass
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 130
    assert ray_files.read_result(store, uri) is None
    second = start(store, uri, tmp_path / "b")  # another node: nothing of the first one's disk is there
    assert second.wait(60) == 0
    assert ray_files.read_result(store, uri).record["summary"]["resumed"] >= 3
    told = steps(log(store, uri))
    assert sorted(set(told)) == list(range(1, 13))
    assert told == sorted(told)


@pytest.mark.slow
def test_a_failure_is_told_with_its_kind_and_forgotten_by_the_next_attempt(tmp_path):
    store = DirectoryStore(tmp_path / "store")
    uri = ray_files.write_request(store, request(refuse=True))
    assert start(store, uri, tmp_path).wait(60) == 2
    failure = ray_files.read_result(store, uri).failure
    assert (failure["kind"], failure["exit_code"]) == ("input", 2)
    assert failure["message"] == "these inputs are refused: give others"
    assert any("these inputs are refused" in line for line in log(store, uri))
    assert not ray_files.begin_attempt(store, uri)
    assert ray_files.read_result(store, uri) is None


@pytest.mark.slow
def test_a_stage_that_the_kernel_kills_is_a_fault_with_a_hint(tmp_path):
    store = DirectoryStore(tmp_path / "store")
    uri = ray_files.write_request(store, request(steps=100, seconds=0.2))
    stage = start(store, uri, tmp_path)
    while "] step 1" not in stage.stdout.readline().decode():
        pass
    (child,) = subprocess.run(["pgrep", "-P", str(stage.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(child), signal.SIGKILL)
    assert stage.wait(30) == 1
    failure = ray_files.read_result(store, uri).failure
    assert (
        failure["message"] == "the process of example was killed by signal 9; the pod's memory may be too small for it"
    )


@pytest.mark.slow
def test_an_unknown_request_is_bad_input(tmp_path):
    store = DirectoryStore(tmp_path / "store")
    stage = start(store, f"{store.uri}/ray-jobs/none", tmp_path)
    assert stage.wait(60) == 2
    assert b"there is no request at" in stage.stdout.read()


class AwayStore(DirectoryStore):
    """A store whose server is away now and then."""

    away = False

    def put_bytes(self, key, data):
        if self.away:
            raise InputError("the store cannot be reached")
        super().put_bytes(key, data)


def test_lines_wait_while_the_store_is_away(tmp_path):
    store = AwayStore(tmp_path / "store")
    uri = f"{store.uri}/ray-jobs/a"
    writer = LogWriter(store, uri, "1", seconds=0.01)
    writer.add("one")
    store.away = True
    time.sleep(0.2)
    for number in range(50):
        writer.add(f"line {number}")
    time.sleep(0.2)
    store.away = False
    writer.close()
    assert log(store, uri) == ["one", *(f"line {number}" for number in range(50))]


def test_what_is_too_much_to_keep_is_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_files, "KEPT_BYTES", 100)
    store = AwayStore(tmp_path / "store")
    store.away = True
    writer = LogWriter(store, f"{store.uri}/ray-jobs/a", "1", seconds=60)
    for _ in range(30):
        writer.add("x" * 10)
    store.away = False
    writer.close()
    lines = log(store, f"{store.uri}/ray-jobs/a")
    assert lines == ["(20 lines were dropped while the object store was away)", *["x" * 10] * 10]


def test_a_success_counts_more_than_the_failures_beside_it(tmp_path):
    store = DirectoryStore(tmp_path / "store")
    uri = f"{store.uri}/ray-jobs/a"
    for attempt, result in (
        ("1", Result(failure={"message": "first"})),
        ("2", Result(record={"summary": {}})),
        ("3", Result(failure={"message": "last"})),
    ):
        ray_files.write_result(store, uri, attempt, result)
        newest = ray_files.read_result(store, uri)
        assert newest.record is not None or json.loads(newest.model_dump_json())["failure"] == {"message": "first"}


def test_two_watchers_that_want_the_same_ask_for_the_same():
    assert request(steps=1).digest() == request(steps=1).digest() != request(steps=2).digest()
