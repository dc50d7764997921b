"""The frame of every stage: where it gets its inputs, where it leaves outputs, records and the reason of a failure.

A stage is a function `run(config, context, inputs) -> StageResult`. Two programs call it:

    python -m components.<stage> --config file.yaml     # by hand: `main`
    a KFP task                                           # `run_component`, from components/<stage>/component.py

The YAML file of a stage by hand has the stage's configuration under `config`, pointers under `inputs`, and `seed`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import BaseModel, ValidationError

from components.runtime import artifacts, errors, ray_block
from components.runtime.contracts import Pointer
from components.runtime.cost import Meter
from components.runtime.errors import InputError, disk_errors
from components.runtime.exporter import exported
from components.runtime.object_store import ObjectStore
from components.runtime.processes import collect_rarely, die_with_owner
from components.runtime.progress import Progress
from components.runtime.settings import NO_USAGE_REPORTING, Settings
from components.runtime.tracking import Tracker


@dataclass
class StageContext:
    """What a stage works with."""

    stage: str
    run_id: str
    seed: int
    work_dir: Path  # private scratch of this stage; emptied when the stage succeeded
    store: ObjectStore
    tracker: Tracker
    progress: Progress
    run: dict[str, str] = field(default_factory=dict)  # run ids for manifests: sparseline, mlflow, kfp
    code: str = ""  # digest of the stage's sources, where a pipeline gives it

    def identity(self, config: BaseModel, inputs: Mapping[str, Pointer]) -> dict[str, Any]:
        """All that the stage's result follows from, whichever run it is made in."""
        return {
            "stage": self.stage,
            "seed": self.seed,
            "code": self.code,
            "config": config.model_dump(mode="json"),
            "inputs": {name: pointer.sha256 for name, pointer in sorted(inputs.items())},
        }

    def publish(
        self,
        kind: str,
        directory: Path,
        *,
        parents: Sequence[Pointer] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> Pointer:
        """Put the files of `directory` into the store, atomically, and return the pointer to them."""
        run = {"sparseline": self.run_id, **self.run}
        pointer = artifacts.publish(
            self.store, kind, directory, stage=self.stage, run=run, parents=parents, facts=dict(facts or {})
        )
        if kind == "checkpoint":
            self.tracker.model(pointer, facts or {})
        return pointer

    def fetch(self, pointer: Pointer) -> Path:
        """A verified local copy of an artifact. Raises InputError when it is missing or damaged."""
        return artifacts.fetch(self.store, pointer, self.work_dir / "inputs")


@dataclass
class StageResult:
    """What a stage leaves: pointers to what it published, and its key numbers."""

    outputs: dict[str, Pointer]
    summary: dict[str, Any]


class StageFunction(Protocol):
    def __call__(self, config: Any, context: StageContext, inputs: dict[str, Pointer]) -> StageResult: ...


def _load(reference: str) -> Any:
    module, name = reference.split(":")
    return getattr(importlib.import_module(module), name)


def _references(stage: str, run: str | None, config: str | None) -> tuple[str, str]:
    camel = "".join(part.capitalize() for part in stage.split("_"))
    return run or f"components.{stage}.run:run", config or f"components.{stage}.config:{camel}Config"


def parse_config(config_class: type[BaseModel], values: Mapping[str, Any], where: str) -> Any:
    """Validate a stage's configuration. Raises InputError that lists every wrong key and value."""
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        problems = [
            f"  {'.'.join(str(part) for part in problem['loc']) or '(whole)'}: {problem['msg']}"
            + ("" if problem["type"] in ("missing", "extra_forbidden") else f" (got {problem['input']!r})")
            for problem in error.errors()
        ]
        raise InputError(
            f"{where} is wrong in {len(problems)} place(s):\n" + "\n".join(problems) + "\n"
            f"known keys: {', '.join(config_class.model_fields)}"
        ) from error


def execute(
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
    """Run one stage and keep its records in `<runs>/<run id>/stages/<stage>`.

    Writes `summary.json` when the stage succeeded and `failure.json` when it did not; the error is raised again.
    """
    directory = settings.stage_directory(stage)
    with disk_errors(directory):
        for old in ("summary.json", "failure.json"):
            (directory / old).unlink(missing_ok=True)
        (directory / "work").mkdir(parents=True, exist_ok=True)
    started, meter = time.monotonic(), Meter()
    progress = Progress(
        directory / "progress.jsonl", stage=stage, echo=echo, run=settings.run_id, structured=settings.structured_log
    )
    tracker = Tracker(directory)
    sink = None
    try:
        with disk_errors(directory):
            run_reference, config_reference = _references(stage, run, config)
            parsed = parse_config(_load(config_reference), config_values, where)
            function: StageFunction = _load(run_reference)
            ids = {"mlflow": settings.mlflow_run_id} if settings.mlflow_run_id else {}
            store = meter.watch(settings.open_store())
            context = StageContext(
                stage, settings.run_id, seed, directory / "work", store, tracker, progress, ids, code
            )
            tracker.parameters({"seed": seed, **parsed.model_dump(mode="json")})
            if not settings.mirrored:
                from components.runtime.mlflow_sink import StageSink

                sink = StageSink(settings, stage)
            with exported(settings.metrics_port, settings.run_id, stage, progress, tracker):
                result = function(parsed, context, inputs)
            cost = meter.cost()
            tracker.metrics({f"cost/{name}": value for name, value in cost.items()}, 0)
            seconds = round(time.monotonic() - started, 3)
            record = {
                "stage": stage,
                "run_id": settings.run_id,
                "seconds": seconds,
                "outputs": {name: pointer.model_dump() for name, pointer in result.outputs.items()},
                "summary": result.summary,
                "cost": cost,
            }
            write_json(directory / "summary.json", record)
            shutil.rmtree(directory / "work", ignore_errors=True)
    except BaseException as error:
        failure = {
            "stage": stage,
            "kind": errors.kind(error),
            "exit_code": errors.exit_code(error),
            "message": str(error) or type(error).__name__,
            "traceback": traceback.format_exc(),
        }
        try:
            write_json(directory / "failure.json", failure)
        except OSError as second:  # a full disk: the log still tells
            print(f"cannot write {directory / 'failure.json'}: {second}", file=sys.stderr)
        if sink:
            sink.close(failed=True)
        raise
    finally:
        tracker.close()
        progress.close()
    if sink:
        sink.close(failed=False)
    return result


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that appears whole. NaN is an error: no reader of ours may meet one."""
    incomplete = path.with_name(f".incomplete-{path.name}")
    try:
        incomplete.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        incomplete.replace(path)
    except BaseException:
        incomplete.unlink(missing_ok=True)
        raise


def _stop_on_sigterm() -> None:
    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def prepare_process() -> None:
    """What a process that runs a stage does first."""
    _stop_on_sigterm()
    collect_rarely()
    os.environ.update({name: value for name, value in NO_USAGE_REPORTING.items() if name not in os.environ})


def run_component(
    stage: str,
    config: str,
    seed: int,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    summary: Any,
    *,
    run: str | None = None,
    config_class: str | None = None,
    code: str = "",
) -> StageResult:
    """The body of a KFP component.

    `config` is JSON; `inputs` maps names to KFP artifacts (or to a pointer's JSON, or "" for none); `outputs` maps the
    names in `StageResult.outputs` to KFP output artifacts; `summary` is the KFP Metrics artifact of the key numbers.
    `code` is the digest of the stage's sources. `run` and `config_class` ("module:name") are for stages that do not
    follow the naming convention. A failure ends the process with the exit code of its kind.
    """
    prepare_process()
    die_with_owner()
    try:
        pointers = {name: pointer for name, value in inputs.items() if (pointer := read_pointer(value)) is not None}
        settings = Settings.read()
        perform = execute
        if ray_block.VARIABLE in os.environ:
            from components.runtime.ray_job import execute_in_ray_job

            perform = execute_in_ray_job
        result = perform(
            stage,
            json.loads(config),
            int(seed),
            pointers,
            settings,
            run=run,
            config=config_class,
            echo=not settings.mirrored,
            where=f"the configuration of {stage}",
            code=code,
        )
    except BaseException as error:
        report(error, stage)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: KFP's executor would print a second traceback over the message.
        os._exit(errors.exit_code(error))
    missing = set(outputs) - set(result.outputs)
    if missing:
        raise RuntimeError(f"the stage {stage} did not give its outputs {', '.join(sorted(missing))}")
    for name, artifact in outputs.items():
        pointer = result.outputs[name]
        Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
        Path(artifact.path).write_text(pointer.model_dump_json() + "\n")
        artifact.metadata.update(pointer.model_dump())
    Path(summary.path).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(settings.stage_directory(stage) / "summary.json", summary.path)
    summary.metadata.update(_numbers(result.summary))
    return result


def _numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(_numbers(value, f"{prefix}{name}."))
        elif isinstance(value, (int, float)):
            found[f"{prefix}{name}"] = float(value)
    return found


def read_pointer(value: Any) -> Pointer | None:
    """The pointer in a KFP artifact, in a pointer's JSON, or None for an empty string."""
    text = value if isinstance(value, str) else Path(value.path).read_text()
    if not text.strip():
        return None
    try:
        return Pointer.model_validate_json(text)
    except ValidationError as error:
        raise InputError(f"{text[:200]!r} is no pointer to an artifact: {error}") from error


def report(error: BaseException, stage: str) -> None:
    """Print what a stage ended with: a message for what a person can act on, the traceback of a fault."""
    if isinstance(error, (InputError, errors.GateRejected, errors.RemoteFault)):
        print(f"{stage}: {error}", file=sys.stderr)
    elif isinstance(error, KeyboardInterrupt):
        print(f"{stage}: stopped", file=sys.stderr)
    else:
        traceback.print_exception(error)


def main(
    stage: str, *, run: str | None = None, config_class: str | None = None, arguments: Sequence[str] | None = None
) -> None:
    """`python -m components.<stage> --config file.yaml`: run the stage, print its summary as JSON, exit."""
    parser = argparse.ArgumentParser(prog=f"python -m components.{stage}", description=f"Run the stage {stage}.")
    parser.add_argument("--config", required=True, type=Path, help="YAML: config, inputs (pointers), seed")
    options = parser.parse_args(arguments)
    prepare_process()
    try:
        document = read_yaml(options.config)
        unknown = set(document) - {"config", "inputs", "seed"}
        if unknown:
            raise InputError(f"{options.config}: unknown key {', '.join(sorted(unknown))}; known: config, inputs, seed")
        pointers = {
            name: pointer
            for name, value in (document.get("inputs") or {}).items()
            if (pointer := read_pointer(json.dumps(value))) is not None
        }
        result = execute(
            stage,
            document.get("config") or {},
            int(document.get("seed", 0)),
            pointers,
            Settings.read(),
            run=run,
            config=config_class,
            where=str(options.config),
        )
    except BaseException as error:
        report(error, stage)
        sys.exit(errors.exit_code(error))
    outputs = {name: pointer.model_dump() for name, pointer in result.outputs.items()}
    print(json.dumps({"outputs": outputs, "summary": result.summary}, indent=1))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises InputError when the file is missing, no YAML, or no mapping."""
    try:
        value = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path} does not exist") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a mapping, not {type(value).__name__}")
    return value
