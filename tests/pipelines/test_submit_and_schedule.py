"""`sparseline submit` and `schedule` by the real SDK, against the REST API of Kubeflow Pipelines.

By default that is the small server in kfp_rest.py; with KFP_ENDPOINT set, what does not need a scripted run is tried on
the Kubeflow Pipelines there.
"""

import importlib.util
import io
import os
import socket
import time
from pathlib import Path

import pytest
from rich.console import Console

from components.runtime.errors import InputError
from pipelines import catalogue, cluster
from pipelines import schedule as schedule_module
from pipelines import submit as submit_module
from pipelines.kfp_server import compiled_version, connect, find_version
from pipelines.schedule import ScheduleOptions, check_cron, existing, list_schedules, remove_schedule, set_schedule
from pipelines.submit import SubmitOptions, submit

specification = importlib.util.spec_from_file_location("kfp_rest", Path(__file__).parent / "kfp_rest.py")
kfp_rest = importlib.util.module_from_spec(specification)
specification.loader.exec_module(kfp_rest)

REAL = os.environ.get("KFP_ENDPOINT", "")
scripted = pytest.mark.skipif(bool(REAL), reason="KFP_ENDPOINT is set: a real run cannot be scripted")
SYNTHESIS = {"pipeline": "synthesis", "profile": "micro"}
NIGHTLY = {"cron": "0 0 3 * * *", "pipeline": "retraining", "profile": "micro"}


@pytest.fixture
def api(monkeypatch):
    for name in ("KFP_ENDPOINT", "KFP_NAMESPACE", "KFP_TOKEN", "KFP_UI", "KFP_CA", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(submit_module, "POLL_SECONDS", 0.01)
    if REAL:
        yield None, REAL
        return
    with kfp_rest.serving() as served:
        yield served


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """Compiling is the slow part and the same each time: every test takes the files of the first."""
    folder = tmp_path_factory.mktemp("compiled")
    original = cluster.compile_profile
    cache = {}

    def compile_profile(pipeline, profile, directory, rehearsal=False):
        key = pipeline.name, profile, rehearsal
        if key not in cache:
            cache[key] = folder / "-".join(map(str, key))
            original(pipeline, profile, cache[key], rehearsal=rehearsal)
        directory.mkdir(exist_ok=True)
        for path in cache[key].iterdir():
            (directory / path.name).write_bytes(path.read_bytes())

    cluster.compile_profile = compile_profile
    yield
    cluster.compile_profile = original


def call(function, *arguments):
    console = Console(file=io.StringIO(), width=200)
    return function(*arguments, console), console.file.getvalue()


def submitted(address, **options):
    return call(submit, SubmitOptions(**{**SYNTHESIS, "endpoint": address, **options}))


def scheduled(address, name, **options):
    return call(set_schedule, ScheduleOptions(name, **{**NIGHTLY, "endpoint": address, **options}))


@pytest.fixture
def name(api):
    """A schedule's name that nobody else uses, gone afterwards."""
    chosen = f"test-{os.getpid()}-{time.monotonic_ns() % 10**9}"
    yield chosen
    server = connect(api[1])
    for one in existing(server, chosen):
        schedule_module.retire(server, one)


def test_the_version_of_the_sources_is_uploaded_once_and_used_again(api):
    state, address = api
    code, told = submitted(address, wait=False)
    assert code == 0
    assert f"{address}/#/runs/details/" in told
    code, again = submitted(address, wait=False)
    assert code == 0
    assert "uploaded" not in again
    server = connect(address)
    version = find_version(server, catalogue.PIPELINES["synthesis"], "micro", upload=False)
    assert f"version  {version.name}" in again
    run = server.client.get_run(again.split("/#/runs/details/")[1].split()[0])
    assert run.pipeline_version_reference.pipeline_version_id == version.version_id
    assert run.runtime_config.parameters == {"seed": 0}
    if state:
        assert [one["name"] for one in state.pipelines.values()] == ["sparseline-synthesis-micro"]
        assert len(state.versions) == 1
        assert [one["display_name"] for one in state.experiments.values()] == ["sparseline"]


@pytest.mark.slow
def test_a_version_is_found_among_many(api, tmp_path):
    server, retraining = connect(api[1]), catalogue.PIPELINES["retraining"]
    first = find_version(server, retraining, "micro")
    _, _, path = compiled_version(retraining, "micro", tmp_path)
    for _ in range(3):
        extra = f"sparseline-retraining-micro-{time.monotonic_ns()}"
        server.client.upload_pipeline_version(str(path), extra, pipeline_id=first.pipeline_id)
    again = find_version(server, retraining, "micro", upload=False)
    assert (again.version_id, again.uploaded) == (first.version_id, False)
    assert find_version(server, retraining, "micro", wanted=extra).version_id != first.version_id


@scripted
@pytest.mark.parametrize(
    "last, tasks, code, told",
    [
        ("SUCCEEDED", {"synthesis": "SUCCEEDED"}, 0, "finished"),
        ("FAILED", {"gate": "SUCCEEDED", "rejected": "FAILED"}, 3, "the gate rejected the candidate"),
        ("FAILED", {"synthesis": "FAILED", "synthesis-driver": "SUCCEEDED"}, 1, "failed in synthesis; the log"),
        ("FAILED", {}, 1, "failed before any task"),
        ("CANCELED", {"synthesis": "RUNNING"}, 130, "canceled on the server"),
    ],
)
def test_exit_codes_are_those_of_a_local_run(api, last, tasks, code, told):
    state, address = api
    state.script = [("PENDING", {}), 503, ("RUNNING", {"synthesis": "RUNNING"}), (last, tasks)]
    found, output = submitted(address)
    assert (found, told in output) == (code, True), output
    lines = output.splitlines()
    assert lines.index("[run] pending") < lines.index("[run] running") < lines.index(f"[run] {last.lower()}")
    assert "[synthesis] running" in lines
    assert "synthesis-driver" not in output


# -- rehearsal and forecast ------------------------------------------------------------------------------------------

TRAINING = {"pipeline": "training", "profile": "nano", "champion": False}
JUDGED = {"synthesis": "SUCCEEDED", "gate": "SUCCEEDED"}


def run_names(state):
    return [one["display_name"].rsplit(" ", 2)[0] for one in state.runs.values()]


@pytest.mark.slow
@scripted
def test_the_first_training_is_rehearsed_and_the_next_is_not(api):
    state, address = api
    state.script = [("RUNNING", {}), ("SUCCEEDED", JUDGED)]
    code, told = submitted(address, **TRAINING)
    assert code == 0
    assert run_names(state) == ["rehearsal of training nano", "training nano"]
    assert {one["name"] for one in state.pipelines.values()} == {
        "sparseline-training-nano",
        "sparseline-training-nano-rehearsal",
    }
    assert "no run of this pipeline has succeeded here yet" in told
    code, told = submitted(address, **TRAINING)
    assert (code, run_names(state)[2:]) == (0, ["training nano"])
    assert "from 1 runs that succeeded" in told
    assert "30 min" in told
    assert submitted(address, **TRAINING, rehearse=True)[0] == 0
    assert run_names(state)[3:] == ["rehearsal of training nano", "training nano"]


@pytest.mark.slow
@scripted
def test_what_a_rehearsal_finds_stops_the_run(api):
    state, address = api
    state.script = [("FAILED", {"synthesis": "FAILED"})]
    code, told = submitted(address, **TRAINING)
    assert code == 1
    assert "the run was not started" in told
    assert run_names(state) == ["rehearsal of training nano"]


@pytest.mark.slow
def test_a_rehearsal_has_the_tasks_and_resources_of_the_real_run_and_a_model_of_its_own(tmp_path):
    import yaml

    training = catalogue.PIPELINES["training"]
    compiled = {}
    for rehearsal in (False, True):
        _, _, path = compiled_version(training, "nano", tmp_path / str(rehearsal), rehearsal=rehearsal)
        compiled[rehearsal] = list(yaml.safe_load_all(path.read_text()))
    real, small = (one[0]["deploymentSpec"]["executors"] for one in (compiled[False], compiled[True]))
    assert real.keys() == small.keys()
    for name, executor in small.items():
        assert executor["container"]["resources"] == real[name]["container"]["resources"]
        environment = {one["name"]: one.get("value") for one in executor["container"]["env"]}
        assert environment["SPARSELINE_MODEL"] == "sparseline-nano-rehearsal"
    # the tasks of the cluster (secrets, settings, account, volumes) are the same, word for word
    assert compiled[True][1] == compiled[False][1]
    text = (tmp_path / "True" / "pipeline.yaml").read_text()
    assert "internal_api" in text
    assert '"train_tasks": 60' in text.replace('\\"', '"')


@scripted
def test_hours_and_gpu_hours_are_those_of_the_longest_of_the_last_runs(api):
    from pipelines.forecast import forecast, succeeded
    from pipelines.profiles import Profile

    state, address = api
    for minutes in (30, 45, 1):  # the last from the cache
        state.minutes, state.script = minutes, [("SUCCEEDED", {"synthesis": "SUCCEEDED"})]
        assert submitted(address)[0] == 0
    state.script = [("FAILED", {"synthesis": "FAILED"})]
    state.minutes = 59
    assert submitted(address)[0] == 1
    profile = Profile(description="d", model="m", cluster={"synthesis": {"gpus": 8, "timeout": 7200, "cpu": "16"}})
    (pipeline_id,) = state.pipelines
    before = succeeded(connect(address), pipeline_id)
    told = call(forecast, catalogue.PIPELINES["synthesis"], profile, before)[1]
    assert "forecast 6.0 GPU hours (from 3 runs that succeeded), at most 16.0" in told
    assert "45 min" in told


def test_what_cannot_be_rehearsed_is_told(api):
    _, address = api
    with pytest.raises(InputError, match="rehearse the training"):
        submitted(address, pipeline="retraining", rehearse=True)
    with pytest.raises(InputError, match="leave --no-wait away"):
        submitted(address, rehearse=True, wait=False)


@scripted
def test_a_server_that_stays_away_is_told(api, monkeypatch):
    state, address = api
    monkeypatch.setattr(submit_module, "LOST_SECONDS", 0.05)
    state.script = [("RUNNING", {}), 503]
    with pytest.raises(InputError, match=r"has not answered .*the run may go on: http"):
        submitted(address)


def test_a_run_that_is_gone_is_told(api):
    with pytest.raises(InputError, match="no longer tells of the run"):
        list(submit_module.states(connect(api[1]), "00000000-0000-0000-0000-000000000000"))


def test_a_schedule_set_twice_is_one(api, name):
    _, address = api
    assert "made" in scheduled(address, name)[1]
    server = connect(address)
    (first,) = existing(server, name)
    assert first.trigger.cron_schedule.cron == "0 0 3 * * *"
    assert (int(first.max_concurrency), first.no_catchup, first.mode) == (1, True, "ENABLE")
    version = find_version(server, catalogue.PIPELINES["retraining"], "micro", upload=False)
    assert first.pipeline_version_reference.pipeline_version_id == version.version_id
    assert "unchanged" in scheduled(address, name)[1]
    (again,) = existing(server, name)
    assert again.recurring_run_id == first.recurring_run_id


def test_a_changed_schedule_replaces_the_old_one(api, name):
    state, address = api
    scheduled(address, name)
    (first,) = existing(connect(address), name)
    if state:
        state.log.clear()
    assert "replaced" in scheduled(address, name, cron="0 30 4 * * 1")[1]
    (second,) = existing(connect(address), name)
    assert second.recurring_run_id != first.recurring_run_id
    assert second.trigger.cron_schedule.cron == "0 30 4 * * 1"
    if state:
        acts = [(method, path) for method, path in state.log if path.startswith("/recurringruns") and method != "GET"]
        old = f"/recurringruns/{first.recurring_run_id}"
        assert acts == [("POST", "/recurringruns"), ("POST", f"{old}:disable"), ("DELETE", old)]


def test_a_set_that_was_cut_short_is_finished_by_the_next(api, name, monkeypatch):
    """It died between creating and retiring: two of one name, one of them wanted."""
    _, address = api
    scheduled(address, name)
    with monkeypatch.context() as patched:
        patched.setattr(schedule_module, "retire", lambda server, one: None)
        scheduled(address, name, cron="0 30 4 * * 1")
    assert len(existing(connect(address), name)) == 2
    scheduled(address, name, cron="0 30 4 * * 1")
    (left,) = existing(connect(address), name)
    assert left.trigger.cron_schedule.cron == "0 30 4 * * 1"


def test_two_schedules_of_one_name_are_told_with_the_command(api, name, monkeypatch):
    _, address = api
    with monkeypatch.context() as patched:
        patched.setattr(schedule_module, "retire", lambda server, one: None)
        scheduled(address, name)
        scheduled(address, name, cron="0 30 4 * * 1")
    before = {one.recurring_run_id for one in existing(connect(address), name)}
    with pytest.raises(InputError, match=f"2 schedules are named {name}(.|\n)*schedule remove {name} --id") as error:
        scheduled(address, name, cron="0 0 5 * * *")
    assert {one.recurring_run_id for one in existing(connect(address), name)} == before
    with pytest.raises(InputError, match="give one by --id"):
        call(remove_schedule, name, "", address, "")
    call(remove_schedule, name, str(error.value).rsplit(" ", 1)[1], address, "")
    assert len(existing(connect(address), name)) == 1


def test_what_was_not_made_here_is_left_alone(api, name):
    _, address = api
    server = connect(address)
    version = find_version(server, catalogue.PIPELINES["retraining"], "micro")
    experiment = server.client.create_experiment("sparseline")
    server.client.create_recurring_run(
        experiment.experiment_id, name, cron_expression="0 0 1 * * *", params={"occasion": ""}, no_catchup=True,
        pipeline_id=version.pipeline_id, version_id=version.version_id,
    )  # fmt: skip
    with pytest.raises(InputError, match="was not made here"):
        scheduled(address, name)
    with pytest.raises(InputError, match="was not made here"):
        call(remove_schedule, name, "", address, "")
    assert len(existing(server, name)) == 1
    assert "not made by sparseline" in call(list_schedules, address, "")[1]


def test_schedules_are_listed_and_removed(api, name):
    _, address = api
    scheduled(address, name)
    told = call(list_schedules, address, "")[1]
    assert "retraining of micro" in " ".join(told.split())
    call(remove_schedule, name, "", address, "")
    assert existing(connect(address), name) == []
    with pytest.raises(InputError, match=f"no schedule {name}"):
        call(remove_schedule, name, "", address, "")


@pytest.mark.parametrize(
    "cron, told",
    [
        ("0 3 * * *", "five fields; KFP's begin with the second: --cron '0 0 3 [*] [*] [*]'"),
        ("daily", "write six fields"),
        ("0 0 3 * * $(x)", "the field day-of-week"),
    ],
)
def test_bad_cron_expressions_are_told(cron, told):
    with pytest.raises(InputError, match=told):
        check_cron(cron)


def test_a_good_cron_expression_keeps_its_meaning():
    assert check_cron(" 0  0/15 3 ? * MON-FRI ") == "0 0/15 3 ? * MON-FRI"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def refusals(address):
    return [
        ({"endpoint": ""}, "set KFP_ENDPOINT(.|\n)*port-forward svc/ml-pipeline"),
        ({"endpoint": "kfp:8888"}, "must start with http"),
        ({"endpoint": f"http://127.0.0.1:{free_port()}"}, "cannot be reached(.|\n)*port-forward svc/ml-pipeline"),
        ({"profile": "giant"}, "unknown profile 'giant'; there are distributed, micro"),
        ({"pipeline": "serving"}, "unknown pipeline 'serving'; there are training, retraining"),
        (
            {"version": "sparseline-synthesis-micro-0"},
            "has no version sparseline-synthesis-micro-0(.|\n)*leave --version",
        ),
        ({"occasion": "x"}, "draws everything from --seed"),
        ({"model": "champion"}, "--model names what"),
        ({"pipeline": "training"}, "no address of MLflow(.|\n)*--no-champion(.|\n)*port-forward svc/sparseline-mlflow"),
    ]


@pytest.mark.parametrize("number", range(9))
def test_bad_input_is_told_before_a_run_exists(api, number):
    state, address = api
    options, told = refusals(address)[number]
    with pytest.raises(InputError, match=told):
        submitted(address, **options)
    if state:
        assert not state.runs


@scripted
def test_without_upload_a_version_that_git_did_not_register_is_refused(api):
    state, address = api
    with pytest.raises(InputError, match=r"it has: none(.|\n)*kubectl -n kubeflow apply -k manifests/pipelines"):
        submitted(address, upload=False)
    assert not state.pipelines


@scripted
def test_a_server_of_many_users_wants_a_namespace(api):
    state, address = api
    state.multi_user = True
    with pytest.raises(InputError, match="give --namespace"):
        submitted(address)
    assert submitted(address, namespace="team-a", wait=False)[0] == 0


def test_a_server_that_is_something_else_is_told():
    from http.server import HTTPServer, SimpleHTTPRequestHandler
    from threading import Thread

    server = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(InputError, match="not as Kubeflow Pipelines 2 does"):
            connect(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


def test_a_schedule_of_what_does_the_same_every_time_is_refused(api, name):
    with pytest.raises(InputError, match="would have the same seed"):
        scheduled(api[1], name, pipeline="training")
