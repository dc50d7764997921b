"""`sparseline run`: executes a compiled pipeline on this machine and shows what it does.

This process owns the run: it starts the object store, the KFP process and nothing else, follows the files that the
stages write, carries their records into MLflow, and ends every child however it ends itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from rich.console import Console

from components.runtime import artifacts, errors, processes
from components.runtime.contracts import Pointer
from components.runtime.embedded_store import EmbeddedStore, embedded_store, weed_program
from components.runtime.errors import InputError, disk_errors, without_password
from components.runtime.object_store import DirectoryStore, ObjectStore, S3Store
from components.runtime.registry import Registry
from components.runtime.settings import NO_USAGE_REPORTING, Settings, new_run_id
from components.runtime.stage import write_json
from pipelines import catalogue, profiles, report, summary
from pipelines.catalogue import Pipeline
from pipelines.code_digest import ROOT
from pipelines.display import display
from pipelines.leftovers import sweep, temporary
from pipelines.mirror import RunMirror
from pipelines.watch import RunWatch

POLL_SECONDS = 0.2
MEMORY_SECONDS = 2.0
STOP_SECONDS = 3.0


@dataclass
class RunOptions:
    """What the command line said. `store`: URI or directory, empty for the embedded one.

    `pipeline`: a name of the catalogue, or a compiled file. `model`: what the evaluation pipeline plays, empty for the
    champion.
    """

    profile: str
    seed: int
    runs: Path = Path("runs")
    store: str = ""
    settings: list[str] = field(default_factory=list)
    pipeline: str | Path = "training"
    base: Path | None = None
    use_cache: bool = True
    model: str = ""


def run(options: RunOptions, console: Console) -> int:
    """Run the pipeline. Returns the exit code: 0, or 1 fault, 2 bad input, 3 rejected by the gate, 130 stopped.

    Raises InputError for whatever is wrong before the first stage starts, nothing is left behind then, and for a disk
    that gets full.
    """
    with disk_errors(options.runs.resolve()):
        return _run(options, console)


def _run(options: RunOptions, console: Console) -> int:
    started = time.monotonic()
    profile = profiles.override(profiles.load(options.profile), options.settings)
    configurations = profiles.resolve(profile)
    pipeline, compiled = chosen(options)
    if options.base and not (options.base / "config.json").is_file():
        raise InputError(f"the base checkpoint {options.base} has no config.json; give a folder in Hugging Face layout")
    runs = options.runs.resolve()
    settings = local_settings(runs, options.store).model_copy(
        update={"run_id": new_run_id(), "model": profile.model, "mirrored": True, "mlflow_run_id": ""}
    )
    directory = runs / settings.run_id
    with ExitStack() as stack:
        with disk_errors(runs):
            stack.enter_context(only_run(runs))
            sweep(runs)
            store_settings, store = stack.enter_context(open_or_embed(settings))
            directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "configurations.json", configurations)
        # It compiles while we connect to MLflow.
        execution = stack.enter_context(Execution(directory, pipeline, compiled))
        try:
            base = publish_base(store, options.base, settings.run_id)
            mirror = RunMirror.connect(store_settings, options.profile, options.seed)
            arguments = arguments_of(pipeline, options, base, mirror)
        except BaseException:
            execution.stop()
            shutil.rmtree(directory, ignore_errors=True)
            raise
        watch = RunWatch(directory, pipeline.stages)
        memory = PeakMemory()
        title = f"sparseline run, {pipeline.title}, profile {options.profile}, seed {options.seed}, {directory}"
        interrupted = False
        try:
            execution.begin(arguments, store_settings, options.use_cache)
            with display(console, title) as shown:
                while True:
                    ended = execution.ended()
                    shown.update(watch, watch.poll())
                    mirror.pump(watch)
                    memory.sample()
                    if ended:
                        break
                    if isinstance(store, EmbeddedStore) and (gone := store.why_gone()):
                        # at once: the stages would wait for it to come back
                        execution.stop()
                        console.print(gone, style="red", markup=False, highlight=False, soft_wrap=True)
                        return errors.EXIT_FAULT
                    time.sleep(POLL_SECONDS)  # between two looks at files that grow
        except KeyboardInterrupt:
            interrupted = True
            execution.stop()
            watch.poll()
        code, message = outcome(watch, execution, interrupted, pipeline)
        status = {0: "finished", 2: "bad input", 3: "rejected", 130: "stopped"}.get(code, "failed")
        made = summary.summarise(
            watch,
            run_id=settings.run_id,
            pipeline=pipeline.name,
            profile=options.profile,
            seed=options.seed,
            wall_seconds=time.monotonic() - started,
            peak_bytes=memory.peak,
            status=status,
        )
        write_json(directory / "summary.json", made)
        page = report.write(directory, made, watch, store)
        mirror.finish(watch, made, [directory / "summary.json", page, directory / "pipeline.yaml"])
        point_latest(runs, directory)
    console.print(summary.table(made))
    local = settings.tracking_uri.startswith("sqlite:///")
    tracked = f"make ui   ({runs / 'mlflow.db'})" if local else without_password(settings.tracking_uri)
    console.print(
        f"report   {page}\nnumbers  {directory / 'summary.json'}\nMLflow   {tracked}",
        highlight=False,
        markup=False,
        soft_wrap=True,  # a path that is broken over lines cannot be copied
    )
    if message:
        console.print(message, style="red" if code != 3 else "yellow", markup=False, highlight=False, soft_wrap=True)
    return code


def chosen(options: RunOptions) -> tuple[Pipeline, Path | None]:
    """The pipeline that the options name, and the compiled file where they give one.

    Raises InputError for an unknown name, a missing or strange file, and options that this pipeline has no use for.
    """
    compiled = None if str(options.pipeline) in catalogue.PIPELINES else Path(options.pipeline)
    pipeline = catalogue.of_file(compiled) if compiled else catalogue.named(str(options.pipeline))
    if options.base and pipeline.name not in ("training", "evaluation"):
        raise InputError(f"--base: the {pipeline.name} pipeline takes no checkpoint; leave it away")
    if options.model and (options.base or pipeline.name != "evaluation"):
        raise InputError("--model names what `--pipeline evaluation` plays; give it there, and without --base")
    return pipeline, compiled


def arguments_of(pipeline: Pipeline, options: RunOptions, base: Pointer | None, mirror: RunMirror) -> dict[str, Any]:
    """The arguments of the pipeline, all of them. Raises InputError when the model to evaluate does not exist."""
    seed = {"seed": options.seed}
    # One text for one command: what is started again goes on after the last finished stage.
    occasion = {"occasion": f"seed {options.seed}"}
    if pipeline.name == "training":
        champion = mirror.champion
        return seed | {
            "base_checkpoint": base.model_dump_json() if base else "",
            "champion": champion.pointer.model_dump_json() if champion else "",
            "champion_version": champion.version if champion else "",
        }
    if pipeline.name == "evaluation":
        if options.model:
            registry = Registry(mirror.settings, mirror.client)
            base = registry.resolve(registry.uri(options.model)).pointer
        return occasion | {"checkpoint": base.model_dump_json() if base else ""}
    return occasion if pipeline.name == "retraining" else seed


def local_settings(runs: Path, store: str) -> Settings:
    """The settings of this machine. An empty `store` in them stands for the embedded one."""
    settings = Settings.read({**os.environ, "SPARSELINE_RUNS": str(runs.resolve())})
    if store:
        return settings.model_copy(update={"store": store})
    if os.environ.get("SPARSELINE_STORE"):
        return settings
    return settings.model_copy(update={"store": "" if weed_program() else str(settings.runs / "store")})


@contextmanager
def only_run(runs: Path) -> Iterator[None]:
    """Hold the runs folder. Raises InputError when another run holds it: the store has one owner."""
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise InputError(
                f"another sparseline (process {holder}) uses {runs}; wait for it, or give --runs"
            ) from error
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


@contextmanager
def open_or_embed(settings: Settings) -> Iterator[tuple[Settings, ObjectStore]]:
    """The store that the settings name, tried out; or, when they name none, the embedded one."""
    if settings.store:
        store = settings.open_store()
        if isinstance(store, S3Store):
            store.ensure_bucket()
        probe = f"probe/{settings.run_id}"
        store.put_bytes(probe, b"sparseline")
        store.remove(probe)
        if isinstance(store, DirectoryStore):
            store.sweep()
        # A directory is given on as a URI: stages may run in another folder.
        yield settings.model_copy(update={"store": store.uri}), store
        return
    with embedded_store(settings.runs / "seaweedfs", settings.runs / "seaweedfs.log") as embedded:
        values = {
            "store": embedded.uri,
            "s3_endpoint": embedded.endpoint,
            "access_key": embedded.access_key,
            "secret_key": embedded.secret_key,
        }
        yield settings.model_copy(update=values), embedded


def serve(settings: Settings, model: str, arguments: Sequence[str]) -> int:
    """Serve `model` from this machine's store until the server ends. Returns its exit code."""
    with only_run(settings.runs), open_or_embed(settings) as (opened, _):
        server = processes.start(
            [sys.executable, "-m", "components.serving", "--model", model, *arguments],
            environment={**os.environ, **opened.environment(), processes.OWNER: processes.identity()},
        )
        try:
            return server.wait()
        finally:
            processes.stop(server)


def publish_base(store: ObjectStore, base: Path | None, run_id: str) -> Pointer | None:
    """The user's own checkpoint, put into the store so that stages get it by a pointer like any other."""
    if base is None:
        return None
    return artifacts.publish(store, "checkpoint", base, stage="base", run={"sparseline": run_id})


class Execution:
    """The KFP process: compiles, waits for its request, executes."""

    def __init__(self, directory: Path, pipeline: Pipeline, compiled: Path | None) -> None:
        self.directory = directory
        self.log = directory / "pipeline.log"
        self.pipeline = directory / "pipeline.yaml"
        if compiled:
            self.pipeline.write_bytes(compiled.read_bytes())
        self._output: IO[bytes] = self.log.open("wb")
        temporary(directory).mkdir()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ,
            **NO_USAGE_REPORTING,
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            # KFP leaves a folder there for each task; it goes with `stop`, or with the next run's sweep
            "TMPDIR": str(temporary(directory)),
            processes.OWNER: processes.identity(),
        }
        self.process = processes.start(
            [sys.executable, "-m", "pipelines.execute", str(directory), pipeline.name],
            environment=environment,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Execution:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._output.close()

    def begin(self, arguments: dict[str, Any], settings: Settings, use_cache: bool) -> None:
        request = {"arguments": arguments, "environment": settings.environment(), "cache": use_cache}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it ended already; `outcome` reads why in its log

    def ended(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """End the KFP process with every stage below it. Finished stages are in the cache already."""
        processes.stop(self.process, seconds=STOP_SECONDS)
        shutil.rmtree(temporary(self.directory), ignore_errors=True)


def outcome(watch: RunWatch, execution: Execution, interrupted: bool, pipeline: Pipeline) -> tuple[int, str]:
    """The run's exit code, and a message for a person when it is not 0."""
    if interrupted:
        return errors.EXIT_INTERRUPTED, "stopped; run the same command again to go on after the last finished stage"
    failed = watch.failed
    if failed:
        message = f"{failed.name}: {failed.failure['message']}"
        if failed.failure["kind"] == "fault":
            message += f"\nthe traceback is in {execution.log}"
        return int(failed.failure["exit_code"]), message
    running = watch.running
    if running:
        running.state, running.ended = "failed", time.monotonic()
        running.failure = {"message": "it ended without saying why (killed? out of memory?)"}
        return errors.EXIT_FAULT, f"{running.name}: {running.failure['message']}; its log is {execution.log}"
    if execution.process.returncode != 0:
        return errors.EXIT_FAULT, f"the pipeline failed; the end of {execution.log}:\n{tail(execution.log)}"
    missing = [name for name in pipeline.ends if watch.stages[name].state not in ("done", "cached")]
    if missing:
        return errors.EXIT_FAULT, (
            f"the pipeline ended without {', '.join(missing)}: {execution.pipeline} is not the whole pipeline; "
            "write it again with `sparseline compile`"
        )
    return 0, ""


def tail(path: Path, lines: int = 15) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


def point_latest(runs: Path, directory: Path) -> None:
    """`runs/latest` names the newest run; replaced in one step."""
    incomplete = runs / ".latest"
    incomplete.unlink(missing_ok=True)
    incomplete.symlink_to(directory.name, target_is_directory=True)
    incomplete.replace(runs / "latest")


class PeakMemory:
    """The largest sum of PSS (resident memory, shared pages counted once) of this process and all below it."""

    def __init__(self) -> None:
        self.peak = 0
        self._last = float("-inf")

    def sample(self) -> None:
        now = time.monotonic()
        if now - self._last < MEMORY_SECONDS:
            return
        self._last = now
        total = 0
        own = psutil.Process()
        for process in [own, *own.children(recursive=True)]:
            try:
                information = process.memory_full_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it ended while we looked
                continue
            total += getattr(information, "pss", information.rss)
        self.peak = max(self.peak, total)
