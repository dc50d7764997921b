"""A distributed stage seen from its task's own pod: makes one RayJob, follows it, and gives back what it gave.

Called by `run_component` where the task carries SPARSELINE_RAY_JOB. What the stage is called with goes through the
object store, and so do its log and its result (`ray_files`); the Kubernetes API is only asked how the RayJob does.
Whatever ends this process, the RayJob does not stay:

- an end of any kind, also SIGTERM: it is deleted here, with all that belongs to it;
- SIGKILL, a lost node: the reaper (`ray_reaper`) finds it without a living watcher;
- a deleted pod or run: it belongs to this pod, so that Kubernetes removes it;
- and it has a deadline of its own.

A pod that Kubeflow starts in place of a killed one finds the RayJob by its name and goes on watching: there are never
two.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from components.runtime import errors, ray_block
from components.runtime.contracts import Pointer
from components.runtime.errors import GateRejected, InputError, RemoteFault
from components.runtime.kubernetes_api import KubernetesApi
from components.runtime.progress import Progress
from components.runtime.ray_block import RayBlock
from components.runtime.ray_files import Request, Result
from components.runtime.ray_manifest import Watcher
from components.runtime.ray_watch import MAKE_SECONDS, Watch, refused
from components.runtime.settings import Settings
from components.runtime.stage import StageResult, write_json

REMOVE_SECONDS, STOPPED_SECONDS = 120.0, 20.0  # to remove it; a pod that is stopped has 30 s


def execute_in_ray_job(
    stage: str,
    config_values: Mapping[str, Any],
    seed: int,
    inputs: dict[str, Pointer],
    settings: Settings,
    *,
    run: str | None = None,
    config: str | None = None,
    echo: bool = True,
    where: str = "the configuration",
    code: str = "",
) -> StageResult:
    """As `stage.execute`, in a RayJob. Leaves the stage's `summary.json` in the stage's folder here.

    Raises InputError (also the stage's own), GateRejected, KeyboardInterrupt, and RemoteFault for a fault in the job.
    """
    progress = Progress(stage=stage, echo=echo, run=settings.run_id, structured=settings.structured_log)
    block = _read_block(os.environ)
    api = KubernetesApi()
    watcher = _read_watcher(api, os.environ)
    store = settings.open_store()
    request = Request(
        run_id=settings.run_id,
        stage=stage,
        config=dict(config_values),
        seed=seed,
        inputs=inputs,
        run=run,
        config_class=config,
        code=code,
        where=where,
    )
    watch = Watch(api, watcher, store, progress, request, block)
    seconds = REMOVE_SECONDS
    try:
        watch.make()
        result = watch.follow()
    except KeyboardInterrupt:
        seconds = STOPPED_SECONDS
        raise
    finally:
        watch.remove(seconds)
    return _give(result, settings, stage)


def _read_block(environment: Mapping[str, str]) -> RayBlock:
    try:
        return RayBlock.model_validate_json(environment[ray_block.VARIABLE])
    except ValidationError as error:
        raise InputError(f"{ray_block.VARIABLE} is of another version of Sparseline; compile again: {error}") from error


def _read_watcher(api: KubernetesApi, environment: Mapping[str, str]) -> Watcher:
    """The pod that we are in. Raises InputError when the task does not say which, or we may not look at it."""
    names = (ray_block.POD_NAME, ray_block.POD_UID, ray_block.POD_NAMESPACE)
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise InputError(f"a task with {ray_block.VARIABLE} needs {', '.join(missing)}; compile the pipeline again")
    name, uid, namespace = (environment[key] for key in names)
    answer = api.patient("GET", f"/api/v1/namespaces/{namespace}/pods/{name}", seconds=MAKE_SECONDS)
    if not answer.ok:
        raise InputError(refused(answer, "get pods", namespace))
    return Watcher(name, uid, namespace, answer.body["spec"])


def _give(result: Result, settings: Settings, stage: str) -> StageResult:
    """The stage's own result or error."""
    if result.record is None:
        failure = result.failure or {}
        raise _as_error(int(failure.get("exit_code", errors.EXIT_FAULT)), str(failure.get("message", "")))
    directory = settings.stage_directory(stage)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "summary.json", result.record)
    outputs = {name: Pointer.model_validate(value) for name, value in result.record["outputs"].items()}
    return StageResult(outputs, result.record["summary"])


def _as_error(exit_code: int, message: str) -> BaseException:
    kinds: dict[int, type[BaseException]] = {errors.EXIT_INPUT: InputError, errors.EXIT_REJECTED: GateRejected}
    return kinds.get(exit_code, RemoteFault)(message)
