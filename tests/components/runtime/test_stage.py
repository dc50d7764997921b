"""The frame of a stage: what it leaves when it succeeds, and what it says when it does not."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from components.runtime import errors
from components.runtime.contracts import Pointer
from components.runtime.errors import GateRejected, InputError, disk_errors
from components.runtime.settings import Settings
from components.runtime.stage import StageResult, execute, parse_config, read_pointer, read_yaml

ROOT = Path(__file__).resolve().parents[3]
REFERENCES = {"run": "stage_under_test:run", "config": "stage_under_test:Config"}


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    steps: int = Field(3, ge=1)
    raises: str = ""


def run(config, context, inputs):
    problem = {"input": InputError("no good"), "gate": GateRejected("worse"), "fault": ZeroDivisionError("oops")}
    if config.raises == "interrupt":
        raise KeyboardInterrupt
    if config.raises:
        raise problem[config.raises]
    directory = context.work_dir / "out"
    directory.mkdir()
    (directory / "weights").write_text(f"{context.seed}")
    context.tracker.metric("loss", 0.5, 1)
    pointer = context.publish("checkpoint", directory, parents=list(inputs.values()), facts={"steps": config.steps})
    assert (context.fetch(pointer) / "weights").read_text() == f"{context.seed}"
    return StageResult({"checkpoint": pointer}, {"loss": 0.5, "steps": config.steps})


@pytest.fixture
def settings(tmp_path, monkeypatch):
    module = types.ModuleType("stage_under_test")
    module.run, module.Config = run, Config
    monkeypatch.setitem(sys.modules, "stage_under_test", module)
    return Settings.read({"SPARSELINE_RUNS": str(tmp_path), "SPARSELINE_RUN_ID": "r1", "SPARSELINE_MIRRORED": "1"})


def test_a_stage_leaves_its_summary_its_records_and_no_scratch(settings):
    result = execute("pretraining", {"steps": 5}, 7, {}, settings, echo=False, **REFERENCES)
    directory = settings.stage_directory("pretraining")
    record = json.loads((directory / "summary.json").read_text())
    assert record["stage"] == "pretraining"
    assert record["run_id"] == "r1"
    assert record["summary"] == {"loss": 0.5, "steps": 5}
    assert record["outputs"] == {"checkpoint": result.outputs["checkpoint"].model_dump()}
    assert not (directory / "work").exists()
    assert not (directory / "failure.json").exists()
    recorded = [json.loads(line) for line in (directory / "tracking.jsonl").read_text().splitlines()]
    assert recorded[0] == {"kind": "parameters", "values": {"seed": 7, "steps": 5, "raises": ""}}
    assert recorded[1]["kind"] == "model"
    assert recorded[1]["pointer"] == result.outputs["checkpoint"].model_dump()


@pytest.mark.parametrize(
    "raises, kind, code",
    [("input", "input", 2), ("gate", "rejected", 3), ("fault", "fault", 1), ("interrupt", "interrupted", 130)],
)
def test_a_failure_is_kept_with_its_kind(settings, raises, kind, code):
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        execute("gate", {"raises": raises}, 0, {}, settings, echo=False, **REFERENCES)
    assert errors.exit_code(caught.value) == code
    failure = json.loads((settings.stage_directory("gate") / "failure.json").read_text())
    assert (failure["kind"], failure["exit_code"]) == (kind, code)
    assert not (settings.stage_directory("gate") / "summary.json").exists()


def test_a_number_that_is_none_of_the_numbers_is_a_fault(settings, monkeypatch):
    monkeypatch.setattr(sys.modules["stage_under_test"], "run", lambda *_: StageResult({}, {"loss": float("nan")}))
    with pytest.raises(ValueError, match="not JSON compliant"):
        execute("pretraining", {}, 0, {}, settings, echo=False, **REFERENCES)
    assert not (settings.stage_directory("pretraining") / "summary.json").exists()


@pytest.mark.parametrize(
    "values, told",
    [
        ({"stepz": 3}, "stepz: Extra inputs are not permitted"),
        ({"steps": "many"}, r"steps: Input should be a valid integer.*\(got 'many'\)"),
        ({"steps": 0}, r"steps: Input should be greater than or equal to 1 \(got 0\)"),
    ],
)
def test_a_wrong_configuration_names_key_value_and_known_keys(values, told):
    with pytest.raises(InputError, match=told) as caught:
        parse_config(Config, values, "the configuration of pretraining")
    assert "the configuration of pretraining is wrong in 1 place" in str(caught.value)
    assert "known keys: steps, raises" in str(caught.value)


def test_pointers_are_read_from_json_and_refused_when_they_are_none():
    pointer = Pointer(kind="task-set", uri="s3://b/p", sha256="a" * 64)
    assert read_pointer(pointer.model_dump_json()) == pointer
    assert read_pointer("") is None
    with pytest.raises(InputError, match="is no pointer"):
        read_pointer('{"uri": "x"}')


@pytest.mark.parametrize("text, told", [("a: [", "is no YAML"), ("- a", "must hold a mapping")])
def test_bad_yaml_is_an_input_error(tmp_path, text, told):
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(InputError, match=told):
        read_yaml(tmp_path / "f.yaml")
    with pytest.raises(InputError, match="does not exist"):
        read_yaml(tmp_path / "none.yaml")


def by_hand(tmp_path, document, **environment):
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(document))
    return subprocess.run(
        [sys.executable, "-m", "components.synthesis", "--config", str(tmp_path / "file.yaml")],
        cwd=ROOT,
        env={**os.environ, "SPARSELINE_RUNS": str(tmp_path / "runs"), "SPARSELINE_MIRRORED": "1", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "document, environment, told",
    [
        ({"config": {"train_tasks": -1}}, {}, "train_tasks: Input should be greater than or equal to 1"),
        ({"configuration": {}}, {}, "unknown key configuration; known: config, inputs, seed"),
        ({"inputs": {"tasks": {"uri": "x"}}}, {}, "is no pointer"),
        ({}, {"SPARSELINE_STORE": "s3://bucket"}, "needs SPARSELINE_S3_ENDPOINT"),
        ({}, {"SPARSELINE_STORE": "/proc/nowhere"}, "/proc/nowhere"),
    ],
)
def test_a_stage_by_hand_refuses_bad_input_in_one_message(tmp_path, document, environment, told):
    done = by_hand(tmp_path, document, **environment)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "runs").rglob("manifest.json"))


@pytest.mark.parametrize(
    "text", ["(sqlite3.OperationalError) database or disk is full", "I/O error: No space left on device (os error 28)"]
)
def test_a_full_disk_is_told_whichever_library_meets_it(tmp_path, text):
    error = RuntimeError("the library's own words")
    error.__context__ = ValueError(text)
    with pytest.raises(InputError, match=f"the disk is full at {tmp_path}; free some"), disk_errors(tmp_path):
        raise error
    with pytest.raises(KeyError), disk_errors(tmp_path):
        raise KeyError("something else")
