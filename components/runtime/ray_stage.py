"""A stage inside a RayJob: the entry point that KubeRay submits to Ray's head.

    python -m components.runtime.ray_stage --request URI

Runs the requested stage in a child process exactly as a task of its own would, sends the lines that it prints to the
store, and leaves the result there (`components.runtime.ray_files`). A child that the kernel kills, for its memory say,
is told as a failure, too. Where the pods are taken away (preemption, a stop) no result is written: the next attempt
goes on from the stage's own training state.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from typing import Any

from components.runtime import errors, processes, ray_files
from components.runtime.object_store import ObjectStore
from components.runtime.ray_files import LogWriter, Request, Result
from components.runtime.settings import Settings
from components.runtime.stage import execute, prepare_process, report

STOP_SECONDS = 20.0  # that a stage has to end by itself; a pod has 30


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m components.runtime.ray_stage", description=__doc__)
    parser.add_argument("--request", required=True, help="URI of a request in the store")
    parser.add_argument("--child", action="store_true", help="run the stage in this process, and send nothing")
    options = parser.parse_args()
    try:
        settings = Settings.read()
        store = settings.open_store()
        request = ray_files.read_request(store, options.request)
        settings = settings.model_copy(update={"run_id": request.run_id})
    except errors.InputError as error:
        report(error, "ray_stage")
        sys.exit(errors.EXIT_INPUT)
    sys.exit(_here(request, settings) if options.child else attempt(request, options.request, store, settings))


def attempt(request: Request, uri: str, store: ObjectStore, settings: Settings) -> int:
    """Run the stage in a child, with its lines and its result to the store. Returns the exit code of the stage."""
    if ray_files.begin_attempt(store, uri):
        return 0
    name = ray_files.new_name()
    log = LogWriter(store, uri, name)
    directory = settings.stage_directory(request.stage)
    for old in ("summary.json", "failure.json"):  # of an attempt before this one on the same disk
        (directory / old).unlink(missing_ok=True)
    command = [sys.executable, "-u", "-m", "components.runtime.ray_stage", "--request", uri, "--child"]
    child = processes.start(
        command,
        environment={**os.environ, "SPARSELINE_RUN_ID": request.run_id},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    stopped = []

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        os.killpg(child.pid, signal.SIGTERM)
        signal.setitimer(signal.ITIMER_REAL, STOP_SECONDS)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGALRM, lambda number, frame: os.killpg(child.pid, signal.SIGKILL))
    assert child.stdout is not None
    for line in child.stdout:
        print(line, end="", flush=True)  # Ray keeps it, too
        log.add(line.rstrip("\n"))
    code = child.wait()
    signal.setitimer(signal.ITIMER_REAL, 0)
    if stopped or code == errors.EXIT_INTERRUPTED:
        log.close(5.0)
        return errors.EXIT_INTERRUPTED
    log.close()
    ray_files.write_result(store, uri, name, _result(request.stage, code, settings))
    return code if code >= 0 else errors.EXIT_FAULT


def _result(stage: str, code: int, settings: Settings) -> Result:
    """What the child left in its folder, or what its end tells where it left nothing."""
    directory = settings.stage_directory(stage)
    if code == 0:
        return Result(record=json.loads((directory / "summary.json").read_text()))
    path = directory / "failure.json"
    if path.is_file():
        return Result(failure=json.loads(path.read_text()))
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = "; the pod's memory may be too small for it" if code == -signal.SIGKILL else ""
    return Result(
        failure={
            "stage": stage,
            "kind": "fault",
            "exit_code": errors.EXIT_FAULT,
            "message": f"the process of {stage} {how}{hint}",
        }
    )


def _here(request: Request, settings: Settings) -> int:
    prepare_process()
    processes.die_with_parent()
    try:
        execute(
            request.stage,
            request.config,
            request.seed,
            request.inputs,
            settings,
            run=request.run,
            config=request.config_class,
            where=request.where or f"the configuration of {request.stage}",
            code=request.code,
        )
    except BaseException as error:
        report(error, request.stage)
        return errors.exit_code(error)
    return 0


if __name__ == "__main__":
    main()
