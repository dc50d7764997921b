"""MLflow on SQLite for real: hierarchy, curves, models, aliases, and a run that KFP made."""

import subprocess
import sys
import time

import pytest

from components.runtime.contracts import Pointer
from components.runtime.errors import InputError
from components.runtime.mlflow_sink import PARENT_TAG, STAGE_TAG, StageSink, find_parent, settings_experiment
from components.runtime.registry import Registry, mlflow_client
from components.runtime.settings import Settings
from components.runtime.tracking import Tracker

pytestmark = pytest.mark.slow


def checkpoint(character: str) -> Pointer:
    return Pointer(kind="checkpoint", uri=f"s3://sparseline/checkpoint/{character}", sha256=character * 64)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return Settings.read({"SPARSELINE_RUNS": str(runs), "SPARSELINE_RUN_ID": "r1", "SPARSELINE_MODEL": "model"})


@pytest.fixture(scope="module")
def client(settings):
    return mlflow_client(settings.tracking_uri)


def record(settings, stage, points):
    directory = settings.stage_directory(stage)
    directory.mkdir(parents=True)
    tracker = Tracker(directory)
    for step in range(points):
        tracker.metric("loss", 1.0 / (step + 1), step)
    tracker.parameters({"rate": 0.5, "inner": {"depth": 3}})
    page = directory / "work" / "page.html"
    page.parent.mkdir()
    page.write_text("<p>report</p>")
    tracker.artifact(page)
    page.unlink()  # as the scratch folder of a stage that has ended
    tracker.model(checkpoint("a"), {"steps": points})
    parts = [("environment", "reset"), ("generation", "turn 1"), ("tool", "search"), ("environment", "verdict")]
    spans = [
        {"kind": kind, "name": name, "start": 10**18 + n * 10**9, "end": 10**18 + (n + 1) * 10**9}
        for n, (kind, name) in enumerate(parts)
    ]
    spans[2] |= {"inputs": {"entity": "Orin"}, "outputs": "nothing"}
    tracker.trace(
        {"name": "kg_query", "inputs": ["who?"], "outputs": {"reward": 1.0}, "tags": {"seed": "3"}, "spans": spans}
    )
    tracker.close()


def test_a_stage_becomes_a_nested_run_with_curves_artifacts_and_a_candidate(settings, client):
    record(settings, "post_training", 2503)  # more than two of MLflow's batches
    StageSink(settings, "post_training").close(failed=False)

    experiment = settings_experiment(client, settings)
    (run,) = client.search_runs([experiment], filter_string=f"tags.`{STAGE_TAG}` = 'post_training'")
    parent = client.get_run(run.data.tags[PARENT_TAG])
    assert parent.data.tags[STAGE_TAG] == "pipeline"
    assert run.info.status == "FINISHED"
    assert run.data.params == {"rate": "0.5", "inner.depth": "3"}
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((point.step, point.value) for point in history) == [(s, 1.0 / (s + 1)) for s in range(2503)]
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["page.html"]

    (trace,) = client.search_traces(locations=[experiment], run_id=run.info.run_id)
    assert trace.info.execution_duration == 4000  # ms
    assert trace.info.tags["sparseline.seed"] == "3"
    root, *spans = trace.data.spans
    assert root.inputs == ["who?"]
    assert root.outputs == {"reward": 1.0}
    told = [(span.name, span.span_type, span.end_time_ns - span.start_time_ns) for span in spans]
    types = [("reset", "CHAIN"), ("turn 1", "LLM"), ("search", "TOOL"), ("verdict", "CHAIN")]
    assert told == [(name, type_, 10**9) for name, type_ in types]
    assert (spans[2].inputs, spans[2].outputs) == ({"entity": "Orin"}, "nothing")
    assert {span.parent_id for span in spans} == {root.span_id}

    (model,) = client.search_logged_models([experiment])
    assert model.tags["sha256"] == "a" * 64
    assert model.tags["uri"] == checkpoint("a").uri
    assert model.source_run_id == run.info.run_id
    candidate = Registry(settings, client).alias("candidate")
    assert candidate.pointer == checkpoint("a")


def test_stages_of_one_run_share_their_parent(settings, client):
    experiment = settings_experiment(client, settings)
    assert find_parent(client, experiment, "r2") == find_parent(client, experiment, "r2")
    assert find_parent(client, experiment, "r2") != find_parent(client, experiment, "r1")


def test_a_run_that_kfp_made_is_resumed_and_left_open(settings, client):
    experiment = settings_experiment(client, settings)
    made = client.create_run(experiment).info.run_id
    before = len(client.search_runs([experiment]))
    inside = settings.model_copy(update={"mlflow_run_id": made, "run_id": "r3"})
    record(inside, "pretraining", 3)
    StageSink(inside, "pretraining").close(failed=False)
    run = client.get_run(made)
    assert run.info.status == "RUNNING"
    assert run.data.metrics["loss"] == pytest.approx(1 / 3)
    assert len(client.search_runs([experiment])) == before


def test_a_run_that_does_not_exist_is_an_input_error(settings):
    with pytest.raises(InputError, match="MLFLOW_RUN_ID"):
        StageSink(settings.model_copy(update={"mlflow_run_id": "0" * 32}), "pretraining")


def test_aliases_move_as_they_should(settings, client):
    registry = Registry(settings.model_copy(update={"model": "other"}), client)
    assert registry.alias("champion") is None
    first = registry.promote(checkpoint("b"))
    assert registry.alias("champion") == first
    assert registry.alias("previous") is None
    assert registry.promote(checkpoint("b")) == first  # again: nothing moves
    assert registry.alias("previous") is None
    second = registry.promote(checkpoint("c"))
    assert second.version != first.version
    assert registry.alias("champion") == second
    assert registry.alias("previous") == first
    assert registry.register(checkpoint("b")) == first  # the same checkpoint is the same version
    assert registry.resolve("models:/other@previous") == first
    assert registry.resolve(f"models:/other/{second.version}") == second
    assert registry.resolve("models:/@champion") == second


@pytest.mark.parametrize(
    "uri, told",
    [
        ("models:/other@nobody", "has no alias 'nobody'"),
        ("models:/other/999", "has no version '999'"),
        ("models:/other", "names no model"),
        ("s3://x", "names no model"),
    ],
)
def test_what_names_no_model_is_an_input_error(settings, client, uri, told):
    with pytest.raises(InputError, match=told):
        Registry(settings.model_copy(update={"model": "other"}), client).resolve(uri)


def test_an_unusable_database_is_an_input_error(tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"this is no database" * 100)
    with pytest.raises(InputError, match="cannot be used"):
        mlflow_client(f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_an_address_is_told_without_its_password(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(InputError, match=r"http://me:\*\*\*@127.0.0.1:9 cannot be used") as told:
        mlflow_client("http://me:s3cret@127.0.0.1:9")
    assert "s3cret" not in str(told.value)


def test_an_error_of_the_database_is_raised_without_a_traceback_of_its_own(tmp_path):
    """A full disk ends the last write of a run: what is wrong is told once, by us. In a process of its own, as pytest
    takes hold of loggers."""
    program = f"""
import sqlite3
from mlflow.exceptions import MlflowException
from components.runtime.registry import mlflow_client
client = mlflow_client("sqlite:///{tmp_path / "mlflow.db"}")
run = client.create_run("0").info.run_id
sqlite3.connect("{tmp_path / "mlflow.db"}").execute("DROP TABLE tags")
try:
    client.set_tag(run, "name", "value")
except MlflowException as error:
    print("raised", "no such table" in str(error))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "raised True\n", done.stderr
    assert "Traceback" not in done.stderr


def test_a_kill_while_the_database_is_made_leaves_none_and_the_next_call_makes_it(tmp_path):
    place = tmp_path / "mlflow.db"
    program = f"from components.runtime.registry import mlflow_client; mlflow_client('sqlite:///{place}')"
    maker = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.DEVNULL)
    half = tmp_path / f".incomplete-mlflow.db-{maker.pid}"
    while not (half.exists() and half.stat().st_size > 100_000):
        assert maker.poll() is None
        assert not place.exists()
        time.sleep(0.001)
    maker.kill()
    maker.wait()
    assert not place.exists()
    assert mlflow_client(f"sqlite:///{place}").search_experiments()
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr


def test_two_processes_that_make_the_database_at_once_share_it(tmp_path):
    program = (
        "from components.runtime.registry import mlflow_client; "
        f"print(mlflow_client('sqlite:///{tmp_path / 'mlflow.db'}').create_run('0').info.run_id)"
    )
    makers = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    ids = {maker.communicate(timeout=120)[0].strip() for maker in makers}
    assert {run.info.run_id for run in mlflow_client(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["0"])} == ids
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]
