"""`python -m pipelines.observer`, a process of its own, against the small server of KFP's REST API; and its arithmetic.

cron_times.tsv holds the newest time of each expression that is not after a moment, told by the library that KFP's
controller uses (github.com/robfig/cron 1.2.0, a Go program that walked `Parse(expression).Next` up to the moment).
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from prometheus_client.parser import text_string_to_metric_families

from components.runtime.errors import InputError
from pipelines import observer
from pipelines.due import last_cron_time, last_due
from pipelines.observer import newest_runs, rejections_in_a_row, was_rejected

HERE, ROOT = Path(__file__).resolve().parent, Path(__file__).resolve().parents[2]
specification = importlib.util.spec_from_file_location("kfp_rest", HERE / "kfp_rest.py")
kfp_rest = importlib.util.module_from_spec(specification)
specification.loader.exec_module(kfp_rest)

TOLD = [line.split("\t") for line in (HERE / "cron_times.tsv").read_text().splitlines()]
NOW = datetime(2026, 6, 17, 12, 34, 56, tzinfo=UTC)


def text(when):
    return when.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# -- when a schedule was due ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expression, moment, newest", TOLD)
def test_the_times_of_an_expression_are_those_of_kfp_s_own_library(expression, moment, newest):
    found = last_cron_time(expression, datetime.fromisoformat(moment), UTC)
    if newest == "never":
        assert found is None or NOW - found > timedelta(days=5 * 365)
    else:
        assert text(found) == newest


def recurring(cron="0 0 3 * * *", **changed):
    made = {"recurring_run_id": "r", "display_name": "nightly", "mode": "ENABLE", "created_at": "2026-01-01T00:00:00Z"}
    return {**made, "max_concurrency": "1", "trigger": {"cron_schedule": {"cron": cron}}, **changed}


def due(one, last_run=None, until=NOW, zone=UTC):
    found = last_due(one, last_run, until, zone)
    return found and text(found)


def cron_schedule(**fields):
    return {"cron_schedule": {"cron": "0 0 3 * * *", **fields}}


@pytest.mark.parametrize(
    "changed, told",
    [
        ({}, "2026-06-17T03:00:00Z"),
        ({"mode": "DISABLE"}, None),
        ({"trigger": {}}, None),
        ({"created_at": "2026-06-17T02:59:59Z"}, "2026-06-17T03:00:00Z"),
        ({"created_at": "2026-06-17T03:00:00Z"}, None),  # Next() is after the moment that it is asked for
        ({"trigger": cron_schedule(start_time="2026-06-18T00:00:00Z")}, None),
        ({"trigger": cron_schedule(end_time="2026-06-01T12:00:00Z")}, "2026-06-01T03:00:00Z"),
        ({"trigger": cron_schedule(end_time="1970-01-01T00:00:00Z")}, "2026-06-17T03:00:00Z"),  # zero stands for none
    ],
)
def test_a_schedule_is_due_while_it_is_on_and_within_its_bounds(changed, told):
    assert due(recurring(**changed)) == told


def test_a_time_zone_moves_what_is_due():
    assert due(recurring("0 0 3 * * *"), zone=ZoneInfo("Europe/Berlin")) == "2026-06-17T01:00:00Z"


def test_a_period_counts_from_the_run_before():
    one = recurring(trigger={"periodic_schedule": {"interval_second": "3600"}}, created_at="2026-06-17T10:00:00Z")
    ten = datetime(2026, 6, 17, 10, tzinfo=UTC)
    assert due(one) == "2026-06-17T11:00:00Z"
    assert due(one, ten + timedelta(minutes=70)) == "2026-06-17T12:10:00Z"
    assert due(one, ten + timedelta(minutes=100)) == "2026-06-17T11:40:00Z"  # that run is what was due last
    assert due(one, until=ten + timedelta(minutes=59)) is None


@pytest.mark.parametrize("expression", ["@every 1h", "nonsense", "0 0 99 * * *", ""])
def test_an_expression_that_cannot_be_read_is_told(expression):
    with pytest.raises(InputError, match="cannot be read"):
        last_cron_time(expression, NOW, UTC)


# -- how far back runs are looked at ----------------------------------------------------------------------------------


def run_row(number, pipeline="p", state="SUCCEEDED", recurring_run_id="", made=NOW):
    reference = {"pipeline_id": pipeline, "pipeline_version_id": "v"}
    return {
        "run_id": f"{pipeline}-{number}", "state": state, "created_at": text(made), "finished_at": text(made),
        "recurring_run_id": recurring_run_id, "pipeline_version_reference": reference,
    }  # fmt: skip


def runs_before(count, own_at=None):
    """Newest first, one a minute; the run number `own_at` is the schedule's."""
    for number in range(count):
        made = NOW - timedelta(minutes=number)
        yield run_row(number, recurring_run_id="r" if number == own_at else "", made=made)


def test_runs_are_looked_at_until_every_schedule_was_met_or_was_not_due_yet(monkeypatch):
    monkeypatch.setattr(observer, "NEWEST", 10)
    hourly, daily = recurring("0 0 * * * *"), recurring("0 0 3 * * *")
    listed = runs_before(10**6)
    assert len(newest_runs(listed, [hourly], NOW, UTC)[0]) == 36  # 12:34 back to the first before 12:00
    assert len(newest_runs(runs_before(10**6, own_at=20), [hourly], NOW, UTC)[0]) == 21
    assert len(newest_runs(runs_before(10**6, own_at=3), [daily], NOW, UTC)[0]) == 10
    assert newest_runs(runs_before(5), [daily], NOW, UTC)[1] == set()
    assert newest_runs(iter(()), [daily], NOW, UTC) == ([], set())


def test_a_schedule_that_was_due_before_all_that_is_looked_at_is_not_judged(monkeypatch):
    monkeypatch.setattr(observer, "MOST", 100)
    monkeypatch.setattr(observer, "NEWEST", 10)
    runs, unknown = newest_runs(runs_before(10**6), [recurring("0 0 3 1 * *")], NOW, UTC)
    assert (len(runs), unknown) == (100, {"r"})


# -- verdicts ---------------------------------------------------------------------------------------------------------

NAMES = {
    "p": "sparseline-retraining-nano",
    "q": "sparseline-training-nano",
    "s": "sparseline-synthesis-nano",
    "d": "sparseline-training-nano-rehearsal",
    "x": "another",
}


def in_a_row(*states, pipeline="p"):
    """`states`: newest first; `rejected` is a run that failed at the gate's no."""
    runs = [
        run_row(number, pipeline, "FAILED" if state == "rejected" else state) for number, state in enumerate(states)
    ]
    no = {run["run_id"] for run, state in zip(runs, states, strict=True) if state == "rejected"}
    return rejections_in_a_row(runs, NAMES, lambda run: run["run_id"] in no)


@pytest.mark.parametrize(
    "states, count",
    [
        (["rejected", "rejected", "SUCCEEDED", "rejected"], 2),
        (["SUCCEEDED", "rejected", "rejected"], 0),
        (["rejected", "FAILED", "rejected"], 2),  # a fault is no verdict
        (["FAILED", "FAILED", "FAILED"], 0),
        (["RUNNING", "CANCELED", "rejected", "SUCCEEDED"], 1),
    ],
)
def test_verdicts_in_a_row(states, count):
    assert in_a_row(*states) == {"sparseline-retraining-nano": count}


def test_pipelines_are_counted_apart_and_only_those_with_a_gate():
    runs = [
        run_row(number, pipeline, "FAILED") for number, pipeline in enumerate(["p", "q", "p", "s", "d", "x", "gone"])
    ]
    assert rejections_in_a_row(runs, NAMES, lambda run: True) == {
        "sparseline-retraining-nano": 2,
        "sparseline-training-nano": 1,
    }


def tasks(**states):
    return {"run_details": {"task_details": [{"display_name": one, "state": state} for one, state in states.items()]}}


def test_a_broken_gate_is_no_rejection():
    assert was_rejected(tasks(gate="SUCCEEDED", rejected="FAILED"))
    assert not was_rejected(tasks(gate="FAILED"))
    assert not was_rejected(tasks(gate="FAILED", rejected="SKIPPED"))
    assert not was_rejected({})


# -- the process ------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def observing(address, *arguments, every="0.1"):
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KFP_")}
    command = [sys.executable, "-m", "pipelines.observer", "--endpoint", address, "--port", str(port), "--every", every]
    process = subprocess.Popen([*command, *arguments], cwd=ROOT, env=clean, stderr=subprocess.PIPE, text=True)
    try:
        yield process, port
    finally:
        process.kill()
        process.communicate()


def scrape(port):
    """By name, the samples: (labels without the id of the schedule, value)."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    found = {}
    for family in families:
        for sample in family.samples:
            label = sample.labels.get("schedule") or sample.labels.get("pipeline") or ""
            found.setdefault(sample.name.removeprefix("sparseline_"), {})[label] = sample.value
    return found


def until(condition, process, seconds=120):
    """What `condition` returns once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        try:
            found = condition()
        except (urllib.error.URLError, ConnectionError):
            found = None
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("it did not come to pass")


def fill(state):
    """Two schedules, one of which has not run when it was due, one that is off, and runs of two pipelines."""
    now = datetime.now(UTC)
    long_ago = text(now - timedelta(days=400))
    state.pipelines = {key: {"pipeline_id": key, "name": name} for key, name in NAMES.items()}
    for name, cron, mode in (
        ("hourly", "0 0 * * * *", "ENABLE"),
        ("missed", "0 0 * * * *", "ENABLE"),
        ("off", "0 0 * * * *", "DISABLE"),
        ("odd", "@every 1h", "ENABLE"),
    ):
        state.recurring[name] = recurring(
            cron, recurring_run_id=name, display_name=name, mode=mode, created_at=long_ago, max_concurrency="2"
        )
    hour = now.replace(minute=0, second=0, microsecond=0)
    rows = [
        (run_row(0, "p", "SUCCEEDED", "missed", hour - timedelta(hours=3)), {}),
        (run_row(1, "p", "FAILED", "", hour - timedelta(hours=2)), {"gate": "SUCCEEDED", "rejected": "FAILED"}),
        (run_row(2, "p", "FAILED", "", hour - timedelta(hours=1)), {"gate": "FAILED"}),
        (run_row(3, "p", "FAILED", "", hour - timedelta(minutes=9)), {"gate": "SUCCEEDED", "rejected": "FAILED"}),
        (run_row(4, "q", "SUCCEEDED", "", hour - timedelta(minutes=5)), {}),
        (run_row(5, "q", "RUNNING", "hourly", now), {}),
    ]
    for run, states in rows:
        state.runs[run["run_id"]] = run
        state.ended[run["run_id"]] = {**run, **tasks(**states)}
    return now, hour


@pytest.mark.slow
def test_it_tells_what_kfp_knows_and_survives_when_kfp_is_away():
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with observing(address) as (process, metrics):
        # KFP is not there yet.
        first = until(lambda: scrape(metrics), process)
        assert first["kfp_up"] == {"": 0.0}
        assert first["kfp_last_answer_timestamp_seconds"] == {"": 0.0}
        assert "schedule_last_due_timestamp_seconds" not in first
        with kfp_rest.serving(port) as (state, _):
            now, hour = fill(state)
            found = until(lambda: (told := scrape(metrics))["kfp_up"][""] and told, process)
            last_hour = hour if now - hour >= timedelta(minutes=1) else hour - timedelta(hours=1)
            assert found["schedule_last_due_timestamp_seconds"]["missed"] in (
                last_hour.timestamp(),
                (last_hour + timedelta(hours=1)).timestamp(),  # it is the full hour now
            )
            assert set(found["schedule_last_due_timestamp_seconds"]) == {"hourly", "missed"}
            assert found["schedule_last_run_timestamp_seconds"] == {
                "hourly": int(now.timestamp()),
                "missed": (hour - timedelta(hours=3)).timestamp(),
                "off": 0.0,
            }
            assert found["schedule_runs_active"] == {"hourly": 1.0, "missed": 0.0, "off": 0.0}
            assert found["schedule_runs_allowed"] == {"hourly": 2.0, "missed": 2.0, "off": 2.0}
            assert found["gate_rejections_in_a_row"] == {
                "sparseline-retraining-nano": 2.0,
                "sparseline-training-nano": 0.0,
            }
            # Failed runs that are known are not asked for again.
            time.sleep(0.5)
            asked = [path for _, path in state.log if path.startswith("/runs/")]
            assert sorted(asked) == ["/runs/p-1", "/runs/p-2", "/runs/p-3"]
        away = until(lambda: (told := scrape(metrics))["kfp_up"][""] == 0 and told, process)
        for name, values in found.items():  # the last values stay
            assert name == "kfp_up" or name.startswith("kfp_last") or away[name] == values
        assert away["kfp_last_answer_timestamp_seconds"][""] > time.time() - 120
        with kfp_rest.serving(port):
            empty = until(lambda: (told := scrape(metrics))["kfp_up"][""] and told, process)
            assert "schedule_last_run_timestamp_seconds" not in empty
            process.send_signal(signal.SIGTERM)  # while KFP is there: else it may tell once more that it is away
            assert process.wait(30) == 0
        said = process.stderr.read()
    assert "the schedule odd is not watched: the cron expression '@every 1h' cannot be read" in said
    assert said.count("ConnectionError") == 2  # once each time, not at every look
    assert "Traceback" not in said


@contextmanager
def silent():
    """A server that takes connections and says nothing."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield f"http://127.0.0.1:{one.getsockname()[1]}"


@contextmanager
def talking(body):
    """A server that answers anything with `body`."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_it_stops_at_once_while_it_waits_for_an_answer():
    with silent() as address, observing(address) as (process, metrics):
        assert until(lambda: scrape(metrics), process)["kfp_up"] == {"": 0.0}
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0  # far less than the time-out of an answer


@pytest.mark.slow
@pytest.mark.parametrize("body", [b"<html>not KFP</html>", b"[]", b'{"recurringRuns": [7]}'])
def test_an_answer_that_is_not_kfp_s_does_not_end_it(body):
    with talking(body) as address, observing(address) as (process, metrics):
        for _ in range(3):
            assert until(lambda: scrape(metrics), process)["kfp_up"] == {"": 0.0}
            time.sleep(0.2)
        assert process.poll() is None


@pytest.mark.slow
@pytest.mark.parametrize(
    "address, arguments, told",
    [
        ("", [], "--endpoint '': give KFP's address"),
        ("ml-pipeline:8888", [], "give KFP's address"),
        ("http://127.0.0.1:1", ["--time-zone", "Mars/Phobos"], "--time-zone 'Mars/Phobos' is not known"),
    ],
)
def test_bad_input_is_told_and_ends_it(address, arguments, told):
    with observing(address, *arguments) as (process, _):
        assert process.wait(120) == 2
        said = process.stderr.read()
    assert told in said
    assert "Traceback" not in said
