"""`sparseline submit`: runs a pipeline on Kubeflow Pipelines and waits for its end; exit codes as of a local run."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from components.runtime import errors
from components.runtime.errors import InputError
from components.runtime.mlflow_sink import RUN_TAG
from components.runtime.registry import CHAMPION, Registry, mlflow_client
from components.runtime.settings import Settings
from pipelines import catalogue, profiles
from pipelines.catalogue import Pipeline
from pipelines.forecast import forecast, succeeded
from pipelines.kfp_server import Server, Version, connect, find_version, reason, requests_of, stage_tasks
from pipelines.profiles import Profile
from pipelines.stages import STAGES

EXPERIMENT = "sparseline"
REHEARSED = ("training", "synthesis")
POLL_SECONDS = 5.0
LOST_SECONDS = 600.0  # how long the server may be away while a run is watched
ENDED = ("SUCCEEDED", "FAILED", "SKIPPED", "CANCELED")


@dataclass
class SubmitOptions:
    """What the command line said.

    champion: whether a training is compared with the registered champion. rehearse: whether the same tasks run at micro
    size first; None: where a training of this profile has never succeeded on the server, micro itself apart.
    """

    pipeline: str = "training"
    profile: str = "nano"
    seed: int = 0
    occasion: str = ""
    model: str = ""
    champion: bool = True
    version: str = ""
    upload: bool = True
    wait: bool = True
    endpoint: str = ""
    namespace: str = ""
    service_account: str = ""
    rehearse: bool | None = None


def submit(options: SubmitOptions, console: Console) -> int:
    """Start the run. Returns the exit code: 0, or 1 fault, 2 bad input, 3 rejected by the gate, 130 stopped.

    Raises InputError for whatever is wrong before the run exists.
    """
    pipeline = catalogue.named(options.pipeline)
    profile = profiles.load(options.profile)
    arguments = arguments_of(pipeline, profile.model, options)
    server = connect(options.endpoint, options.namespace)
    version = find_version(server, pipeline, options.profile, wanted=options.version, upload=options.upload)
    tell_version(version, console)
    before = succeeded(server, version.pipeline_id)
    if to_rehearse(pipeline, options, before):
        code = rehearse(server, pipeline, profile, options, console)
        if code:
            return code
    forecast(pipeline, profile, before, console)
    run_id = start(server, f"{pipeline.name} {options.profile}", version, arguments, options, console)
    return follow(server, run_id, console) if options.wait else 0


def to_rehearse(pipeline: Pipeline, options: SubmitOptions, before: list[Any]) -> bool:
    """Whether the same tasks are to run at micro size first; `before`: the runs that succeeded.

    Raises InputError where that cannot be.
    """
    if options.rehearse is None:
        first = pipeline.name == "training" and options.profile != "micro" and options.wait
        return first and not before
    if options.rehearse and pipeline.name not in REHEARSED:
        raise InputError(
            f"--rehearse: {pipeline.name} starts from a registered model of its own size; rehearse the training"
        )
    if options.rehearse and not options.wait:
        raise InputError("--rehearse waits for the rehearsal; leave --no-wait away")
    return options.rehearse


def rehearse(server: Server, pipeline: Pipeline, profile: Profile, options: SubmitOptions, console: Console) -> int:
    """The same tasks at micro size, with the same secrets, store, queue, nodes and account. Returns its exit code."""
    version = find_version(server, pipeline, options.profile, upload=options.upload, rehearsal=True)
    console.print("a rehearsal first, at micro size (--no-rehearse leaves it away)", soft_wrap=True)
    tell_version(version, console)
    arguments = arguments_of(pipeline, profiles.rehearsal(profile).model, options)
    run_id = start(server, f"rehearsal of {pipeline.name} {options.profile}", version, arguments, options, console)
    code = follow(server, run_id, console)
    if code:
        console.print("the rehearsal did not come through, so the run was not started", style="red", soft_wrap=True)
    return code


def tell_version(version: Version, console: Console) -> None:
    told = f"version  {version.name}" + (", uploaded" if version.uploaded else "")
    console.print(told, highlight=False, markup=False, soft_wrap=True)


def start(
    server: Server, what: str, version: Version, arguments: dict[str, Any], options: SubmitOptions, console: Console
) -> str:
    """Start a run of this version and say where it is. Returns its id."""
    name = f"{what} {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())}"
    with requests_of("start the run"):
        experiment = server.client.create_experiment(EXPERIMENT, namespace=server.namespace or None)
        run = server.client.run_pipeline(
            experiment.experiment_id,
            name,
            params=arguments,
            pipeline_id=version.pipeline_id,
            version_id=version.version_id,
            service_account=options.service_account or None,
        )
    console.print(
        f"run      {name}\nKFP      {server.run_link(run.run_id)}", highlight=False, markup=False, soft_wrap=True
    )
    return str(run.run_id)


def arguments_of(pipeline: Pipeline, model: str, options: SubmitOptions) -> dict[str, Any]:
    """The arguments of the run.

    Raises InputError when the champion or the model cannot be looked up, and for an option that this pipeline has no
    use for.
    """
    if options.occasion and pipeline.name not in ("retraining", "evaluation"):
        raise InputError(f"--occasion: the {pipeline.name} pipeline draws everything from --seed; give that")
    if options.model and pipeline.name != "evaluation":
        raise InputError("--model names what `--pipeline evaluation` plays; give it there")
    if pipeline.name == "retraining":
        return {"occasion": options.occasion}
    if pipeline.name == "evaluation":
        found = _registry(model).resolve(_registry(model).uri(options.model)) if options.model else None
        return {"occasion": options.occasion, "checkpoint": found.pointer.model_dump_json() if found else ""}
    if pipeline.name == "synthesis":
        return {"seed": options.seed}
    otherwise = "or give --no-champion to compare the candidate with its own checkpoint before RL"
    champion = _registry(model, otherwise).alias(CHAMPION) if options.champion else None
    return {
        "seed": options.seed,
        "base_checkpoint": "",
        "champion": champion.pointer.model_dump_json() if champion else "",
        "champion_version": champion.version if champion else "",
    }


def _registry(model: str, otherwise: str = "") -> Registry:
    address = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not address:
        raise InputError(
            "no address of MLflow, which knows the champion: forward it"
            + (f", {otherwise}" if otherwise else "")
            + "\n  kubectl -n sparseline port-forward svc/sparseline-mlflow 5000 & "
            "export MLFLOW_TRACKING_URI=http://127.0.0.1:5000"
        )
    settings = Settings.read().model_copy(update={"model": model})
    return Registry(settings, mlflow_client(address))


def follow(server: Server, run_id: str, console: Console) -> int:
    """Show what the run does until it ends. Returns its exit code."""
    progress = Progress()
    try:
        for run in states(server, run_id):
            for line in progress.lines(run):
                console.print(line, highlight=False, markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(f"no longer watched; the run goes on: {server.run_link(run_id)}", markup=False, soft_wrap=True)
        return errors.EXIT_INTERRUPTED
    for line in mlflow_link(run_id):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    code, message = outcome(run)
    console.print(message, style={0: "green", 3: "yellow"}.get(code, "red"), markup=False, soft_wrap=True)
    return code


def states(server: Server, run_id: str) -> Iterator[Any]:
    """The run as the server tells of it, again and again, the last time when it has ended.

    A server that is away for a while is waited for. Raises InputError when it stays away or knows no such run.
    """
    from kfp_server_api.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    seen = time.monotonic()
    while True:
        try:
            run = server.client.get_run(run_id)
        except (ApiException, HTTPError) as error:
            status = getattr(error, "status", None) or 0
            if 400 <= status < 500 and status != 429:
                raise InputError(f"Kubeflow Pipelines no longer tells of the run {run_id}: {reason(error)}") from error
            if time.monotonic() - seen > LOST_SECONDS:
                raise InputError(
                    f"Kubeflow Pipelines at {server.endpoint} has not answered for {LOST_SECONDS / 60:g} minutes; the "
                    f"run may go on: {server.run_link(run_id)}"
                ) from error
        else:
            seen = time.monotonic()
            yield run
            if run.state in ENDED:
                return
        time.sleep(POLL_SECONDS)  # between two looks at the server


def stage_states(run: Any) -> dict[str, str]:
    """The state of each stage that the server tells of."""
    found = {name: task.state or "PENDING" for name, task in stage_tasks(run)}
    return {name: found[name] for name in STAGES if name in found}


class Progress:
    """What changed since the last look, one line each."""

    def __init__(self) -> None:
        self._run, self._stages = "", dict[str, str]()

    def lines(self, run: Any) -> list[str]:
        told = []
        if run.state and run.state != self._run:
            self._run = run.state
            told.append(f"[run] {run.state.lower()}")
        for name, state in stage_states(run).items():
            if self._stages.get(name) != state:
                self._stages[name] = state
                told.append(f"[{name}] {state.lower()}")
        return told


def outcome(run: Any) -> tuple[int, str]:
    """The exit code of a run that has ended, and a sentence for a person."""
    if run.state == "SUCCEEDED":
        return 0, "finished"
    if run.state in ("CANCELED", "SKIPPED"):
        return errors.EXIT_INTERRUPTED, f"the run was {run.state.lower()} on the server"
    stages = stage_states(run)
    failed = [name for name, state in stages.items() if state == "FAILED"]
    if "rejected" in failed:
        return errors.EXIT_REJECTED, "the gate rejected the candidate; the log of the task Rejected has its reasons"
    # Whether it was bad input stands in the task's log only: KFP's launcher ends with 1 whatever the stage ended with.
    told = run.error.message if run.error and run.error.message else ""
    where = f"in {', '.join(failed)}; the log of that task says why" if failed else "before any task"
    return errors.EXIT_FAULT, f"the run failed {where}" + (f" ({told})" if told else "")


def mlflow_link(run_id: str) -> list[str]:
    """A line with the address of the run in MLflow, where MLFLOW_TRACKING_URI is the address of a server."""
    address = os.environ.get("MLFLOW_TRACKING_URI", "").rstrip("/")
    if not address.startswith("http"):
        return []
    try:
        client = mlflow_client(address)
    except InputError as error:
        return [f"MLflow   {error}"]
    experiments = [one.experiment_id for one in client.search_experiments()]
    for tag in ("kfp.pipeline_run_id", RUN_TAG):
        found = client.search_runs(experiments, f"tags.`{tag}` = {json.dumps(run_id)}", max_results=1)
        if found:
            info = found[0].info
            return [f"MLflow   {address}/#/experiments/{info.experiment_id}/runs/{info.run_id}"]
    return [f"MLflow   {address} (no run of this one yet)"]
