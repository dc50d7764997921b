"""Schedules and gate verdicts of Kubeflow Pipelines as Prometheus metrics, which its own do not tell.

    python -m pipelines.observer --endpoint http://127.0.0.1:8888 --port 9465
    curl http://localhost:9465/metrics

Once a minute it asks KFP's REST API; a scrape gives what was found last. While KFP does not answer, the last values
stay, and `sparseline_kfp_last_answer_timestamp_seconds` tells their age. It speaks plain HTTP: an image starts with
KFP's SDK switched off (`_KFP_RUNTIME`), as its tasks want it. KFP_TOKEN, KFP_CA and KFP_NAMESPACE are those of
`pipelines/kfp_server.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import islice
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import requests
from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from components.runtime.errors import EXIT_INPUT, InputError, without_password
from pipelines.catalogue import PIPELINES, PREFIX
from pipelines.due import last_due, read_time

PORT = 9465
EVERY_SECONDS = 60.0
TIMEOUT_SECONDS = 15.0  # without an answer
# What KFP's controller gets to start a run that is due: it looks at its schedules every ten seconds or so.
START_SECONDS = 60.0
PAGE = 100
NEWEST = 200  # runs looked at in any case, for the verdicts
MOST = 2000  # runs looked at, however long ago a schedule was due
ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")
GATED = tuple(f"{PREFIX}{one.name}-" for one in PIPELINES.values() if "gate" in one.stages)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Schedule:
    """What is known of one recurring run; times in seconds since 1970. `due`: None where nothing was due yet."""

    name: str
    recurring_run_id: str
    due: float | None
    last_run: float  # 0: none
    active: int
    allowed: int


@dataclass(frozen=True)
class Facts:
    """What one look at KFP found. `rejections`: by pipeline, how many of its newest verdicts in a row were a no."""

    schedules: tuple[Schedule, ...] = ()
    rejections: Mapping[str, int] = field(default_factory=dict)


class Server:
    """KFP's REST API, read only. Raises requests.RequestException where it does not answer as it should."""

    def __init__(self, endpoint: str, namespace: str = "") -> None:
        self.endpoint, self.namespace = endpoint, namespace
        self.session, self.authority = requests.Session(), os.environ.get("KFP_CA") or True
        if token := os.environ.get("KFP_TOKEN"):
            self.session.headers["Authorization"] = f"Bearer {token}"

    def get(self, path: str, **query: Any) -> Any:
        address = f"{self.endpoint}/apis/v2beta1/{path}"
        wanted = {name: value for name, value in query.items() if value}
        answer = self.session.get(address, params=wanted, timeout=TIMEOUT_SECONDS, verify=self.authority)
        answer.raise_for_status()
        return answer.json()

    def rows(self, path: str, named: str, **query: Any) -> Iterator[Row]:
        """Everything that a listing gives, page by page."""
        token = ""
        while True:
            page = self.get(path, page_token=token, page_size=PAGE, namespace=self.namespace, **query)
            yield from page.get(named) or []
            token = page.get("next_page_token") or ""
            if not token:
                return


def look(server: Server, known: dict[tuple[str, str], bool], now: datetime, zone: tzinfo) -> Facts:
    """What KFP says now.

    `known`: whether the failed runs of the last look were rejected, by id and end; brought up to date. Raises
    requests.RequestException where KFP does not answer.
    """
    recurring = list(server.rows("recurringruns", "recurringRuns"))
    pipelines = {one["pipeline_id"]: str(one.get("name") or "") for one in server.rows("pipelines", "pipelines")}
    until = now - timedelta(seconds=START_SECONDS)
    readable = [one for one in recurring if can_be_read(one, until, zone)]
    runs, unknown = newest_runs(server.rows("runs", "runs", sort_by="created_at desc"), readable, until, zone)
    judged = dict[tuple[str, str], bool]()

    def rejected(run: Row) -> bool:
        key = run["run_id"], str(run.get("finished_at"))  # a run that is tried again ends anew
        # A listing has no tasks.
        judged[key] = known[key] if key in known else was_rejected(server.get(f"runs/{run['run_id']}"))
        return judged[key]

    schedules = [schedule(one, runs, until, zone) for one in readable if one["recurring_run_id"] not in unknown]
    facts = Facts(tuple(schedules), rejections_in_a_row(runs, pipelines, rejected))
    known.clear()
    known.update(judged)
    return facts


def can_be_read(recurring: Row, until: datetime, zone: tzinfo) -> bool:
    """Whether its cron expression can be read. One that cannot is told in the log, and has no metrics."""
    try:
        last_due(recurring, None, until, zone)
    except InputError as error:
        log(f"the schedule {recurring.get('display_name')} is not watched: {error}")
        return False
    return True


def newest_runs(
    listed: Iterable[Row], recurring: Iterable[Row], until: datetime, zone: tzinfo
) -> tuple[list[Row], set[str]]:
    """The newest of the runs `listed` (newest first), back to the last time at which each schedule was due.

    With it the ids of the schedules of which that is not known: MOST runs were looked at, and it lies before them.
    """
    due = {one["recurring_run_id"]: last_due(one, None, until, zone) for one in recurring}
    open_ = {name: when for name, when in due.items() if when}
    runs: list[Row] = []
    for run in islice(listed, MOST):
        runs.append(run)
        made = read_time(run.get("created_at"))
        met = run.get("recurring_run_id")
        # Met, or passed: what was made before it was due is not what it is due to start.
        open_ = {name: when for name, when in open_.items() if name != met and (made is None or made >= when)}
        if len(runs) >= NEWEST and not open_:
            break
    return runs, set(open_) if len(runs) == MOST else set()


def schedule(recurring: Row, runs: Iterable[Row], until: datetime, zone: tzinfo) -> Schedule:
    """What is known of a recurring run, from the newest runs. Raises InputError as `last_due`."""
    own = [run for run in runs if run.get("recurring_run_id") == recurring["recurring_run_id"]]
    last_run = max((made for run in own if (made := read_time(run.get("created_at")))), default=None)
    due = last_due(recurring, last_run, until, zone)
    return Schedule(
        str(recurring.get("display_name")),
        recurring["recurring_run_id"],
        due.timestamp() if due else None,
        last_run.timestamp() if last_run else 0.0,
        sum(run.get("state") not in ENDED for run in own),
        int(recurring.get("max_concurrency") or 1),
    )


def was_rejected(run: Row) -> bool:
    """Whether a failed run, with its tasks, ended at the gate's no. A gate that broke is a fault, and no verdict."""
    tasks = (run.get("run_details") or {}).get("task_details") or []
    return any(task.get("display_name") == "rejected" and task.get("state") == "FAILED" for task in tasks)


def rejections_in_a_row(
    runs: Iterable[Row], pipelines: Mapping[str, str], rejected: Callable[[Row], bool]
) -> dict[str, int]:
    """By pipeline that has a gate, how many of its newest verdicts in a row were a rejection.

    `runs`: newest first. `pipelines`: names by id. A run without a verdict (it goes on, was stopped, or failed
    elsewhere) neither counts nor ends the row. Rehearsals are left out: their models are not meant to be good.
    """
    counts, closed = Counter[str](), set[str]()
    for run in runs:
        name = pipelines.get((run.get("pipeline_version_reference") or {}).get("pipeline_id") or "", "")
        if not name.startswith(GATED) or name.endswith("-rehearsal") or name in closed:
            continue
        counts[name] += 0  # a series that begins at 0
        if run.get("state") == "SUCCEEDED":
            closed.add(name)
        elif run.get("state") == "FAILED" and rejected(run):
            counts[name] += 1
    return dict(counts)


class Observer(Collector):
    """What the last look found, as metrics."""

    def __init__(self) -> None:
        self.up, self.answered, self.facts = False, 0.0, Facts()

    def collect(self) -> Iterable[Metric]:
        """Called at each scrape, by a thread of the endpoint."""
        # One reading: a look that ends meanwhile replaces the facts.
        facts = self.facts
        yield GaugeMetricFamily("sparseline_kfp_up", "whether Kubeflow Pipelines answered the last time", self.up)
        yield GaugeMetricFamily(
            "sparseline_kfp_last_answer_timestamp_seconds", "when it answered last; 0: never", self.answered
        )
        labels = ["schedule", "recurring_run_id"]
        due = GaugeMetricFamily(
            "sparseline_schedule_last_due_timestamp_seconds", "when the schedule had to start a run", labels=labels
        )
        last = GaugeMetricFamily(
            "sparseline_schedule_last_run_timestamp_seconds", "when it started its newest run; 0: none", labels=labels
        )
        active = GaugeMetricFamily("sparseline_schedule_runs_active", "runs of it that go on", labels=labels)
        allowed = GaugeMetricFamily("sparseline_schedule_runs_allowed", "runs of it at a time", labels=labels)
        for one in facts.schedules:
            own = [one.name, one.recurring_run_id]
            if one.due is not None:
                due.add_metric(own, one.due)
            last.add_metric(own, one.last_run)
            active.add_metric(own, one.active)
            allowed.add_metric(own, one.allowed)
        yield from (due, last, active, allowed)
        rejections = GaugeMetricFamily(
            "sparseline_gate_rejections_in_a_row", "newest verdicts of the gate that were a no", labels=["pipeline"]
        )
        for name, count in sorted(facts.rejections.items()):
            rejections.add_metric([name], count)
        yield rejections


def observe(endpoint: str, namespace: str, port: int, every: float, zone: str) -> None:
    """Look every `every` seconds and serve what was found at `port`, until SIGTERM or Ctrl-C.

    KFP that is away, now or at the start, is asked again and again. Raises InputError for an address that is none, an
    unknown time zone, or a port that cannot be used.
    """
    endpoint = endpoint.rstrip("/")
    if not endpoint.startswith(("http://", "https://")):
        raise InputError(
            f"--endpoint {endpoint!r}: give KFP's address, http://... or https://... (or set KFP_ENDPOINT)"
        )
    place = time_zone(zone)
    observer, registry = Observer(), CollectorRegistry()
    registry.register(observer)
    try:
        start_http_server(port, registry=registry)
    except OSError as error:
        raise InputError(f"port {port} cannot be used: {error.strerror}; give another one by --port") from error
    shown = without_password(endpoint)
    log(f"metrics on port {port}; Kubeflow Pipelines at {shown}, every {every:g} s")
    server, known, told = Server(endpoint, namespace), dict[tuple[str, str], bool](), ""
    while True:
        try:
            observer.facts = look(server, known, datetime.now(UTC), place)
            observer.up, observer.answered, reason = True, time.time(), "answers"
        except Exception as error:
            # Whatever came instead of an answer, the next one may be good; ending would only lose the last values.
            observer.up, reason = False, refusal(error)
        if reason != told:
            log(f"Kubeflow Pipelines at {shown}: {reason}")
            told = reason
        time.sleep(every)


def refusal(error: Exception) -> str:
    """In words what went wrong; the traceback, too, of what nobody expected."""
    if isinstance(error, requests.HTTPError):
        return f"refuses us ({error.response.status_code}): {error.response.text[:200]}"
    if isinstance(error, requests.RequestException):
        return f"does not answer as it should ({type(error).__name__})"
    return "".join(traceback.format_exception(error))


def time_zone(name: str) -> tzinfo:
    """Raises InputError for a name that is not known here."""
    if name == "UTC":
        return UTC  # needs no database of zones
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise InputError(f"--time-zone {name!r} is not known here; give UTC, or a name as Europe/Berlin") from error


def log(text: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text}", file=sys.stderr, flush=True)


def _stop(number: int, frame: Any) -> None:
    sys.exit(0)


def main() -> None:
    """Entry point: exit code 0 when stopped, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.observer", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--endpoint", default=os.environ.get("KFP_ENDPOINT", ""), help="address of KFP's API")
    parser.add_argument("--namespace", default=os.environ.get("KFP_NAMESPACE", ""), help="where KFP serves many users")
    parser.add_argument("--port", type=int, default=PORT, help="where the metrics are served")
    parser.add_argument("--every", type=float, default=EVERY_SECONDS, help="seconds between two looks")
    parser.add_argument("--time-zone", default="UTC", help="KFP's CRON_SCHEDULE_TIMEZONE")
    options = parser.parse_args()
    # Also while an answer is waited for: an exception, and not a flag.
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, _stop)
    try:
        observe(options.endpoint, options.namespace, options.port, options.every, options.time_zone)
    except InputError as error:
        print(f"observer: {error}", file=sys.stderr)
        sys.exit(EXIT_INPUT)


if __name__ == "__main__":
    main()
