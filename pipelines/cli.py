"""The command line: `sparseline run`, `submit`, `schedule`, `compile`, `profiles`, `verify`, `serve`, `doctor`, ..."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from components.runtime import errors
from components.runtime.errors import InputError

app = typer.Typer(
    name="sparseline",
    help="Turns a dense language model into a long-context agent with DeepSeek Sparse Attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RUNS = typer.Option(help="folder of runs", envvar="SPARSELINE_RUNS")
PIPELINE = typer.Option(help="training, retraining, evaluation or synthesis")
PROFILE = typer.Option(help="profile by name (`sparseline profiles`)")
ENDPOINT = typer.Option(help="address of Kubeflow Pipelines", envvar="KFP_ENDPOINT")
NAMESPACE = typer.Option(help="namespace, where Kubeflow Pipelines serves many users", envvar="KFP_NAMESPACE")
ACCOUNT = typer.Option(help="Kubernetes service account of the pods; default: that of KFP")
VERSION = typer.Option(help="a registered version by name; default: the one of these sources")
UPLOAD = typer.Option(help="upload the version when the server lacks it (--no-upload: Git registers versions)")
schedules = typer.Typer(help="Recurring runs on Kubeflow Pipelines, by name.", no_args_is_help=True)
app.add_typer(schedules, name="schedule")
made = typer.Typer(help="The runs of this machine.", no_args_is_help=True)
app.add_typer(made, name="runs")


@app.command()
def run(
    profile: Annotated[str, typer.Option(help="profile by name (`sparseline profiles`), or a .yaml file")] = "nano",
    seed: Annotated[int, typer.Option(min=0, help="seed of everything random")] = 0,
    runs: Annotated[Path, RUNS] = Path("runs"),
    store: Annotated[
        str,
        typer.Option(help="s3://BUCKET/PREFIX (MinIO or any S3) or a directory; default: embedded SeaweedFS"),
    ] = "",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="STAGE.KEY=VALUE, over the profile; may be repeated")
    ] = None,
    pipeline: Annotated[
        str, typer.Option(help="training, retraining, evaluation, synthesis, or a compiled pipeline's file")
    ] = "training",
    base: Annotated[
        Path | None, typer.Option(help="start from (or evaluate) this checkpoint: a folder, Hugging Face layout")
    ] = None,
    model: Annotated[
        str, typer.Option(help="what to evaluate: champion, candidate, previous, a version, models:/...")
    ] = "",
    cache: Annotated[bool, typer.Option(help="use results of earlier runs where nothing changed")] = True,
) -> None:
    """Run a pipeline on this machine: training, unless another one is named."""
    from pipelines.run import RunOptions
    from pipelines.run import run as run_pipeline

    options = RunOptions(profile, seed, runs, store, set_ or [], pipeline, base, cache, model)
    raise typer.Exit(run_pipeline(options, Console()))


@app.command("compile")
def compile_(
    profile: Annotated[str, typer.Option(help="profile by name, or a .yaml file")] = "nano",
    pipeline: Annotated[str, typer.Option(help="training, retraining, evaluation or synthesis")] = "training",
    output: Annotated[Path, typer.Option(help="the file to write; with --all, the folder")] = Path("pipeline.yaml"),
    set_: Annotated[list[str] | None, typer.Option("--set", help="STAGE.KEY=VALUE, over the profile")] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="every pipeline and profile, for a cluster, into a folder")
    ] = False,
) -> None:
    """Write a pipeline as KFP v2 YAML."""
    from pipelines import catalogue, profiles

    if all_:
        if set_:
            raise InputError("--all takes no --set: what a cluster runs stands in the profiles")
        from pipelines.cluster import compile_all

        with errors.disk_errors(output):
            print(*compile_all(output), sep="\n")
        return

    configurations = profiles.resolve(profiles.override(profiles.load(profile), set_ or []))
    with errors.disk_errors(output):
        print(catalogue.named(pipeline).compile(configurations, output))


@app.command()
def submit(
    pipeline: Annotated[str, PIPELINE] = "training",
    profile: Annotated[str, PROFILE] = "nano",
    seed: Annotated[int, typer.Option(min=0, help="seed of training and synthesis")] = 0,
    occasion: Annotated[
        str, typer.Option(help="what the seed of retraining and evaluation follows from; default: the run's id")
    ] = "",
    model: Annotated[str, typer.Option(help="what to evaluate: candidate, previous, a version, models:/...")] = "",
    champion: Annotated[bool, typer.Option(help="compare a training with the registered champion")] = True,
    version: Annotated[str, VERSION] = "",
    upload: Annotated[bool, UPLOAD] = True,
    wait: Annotated[bool, typer.Option(help="wait for the end and show what happens")] = True,
    rehearse: Annotated[
        bool | None,
        typer.Option(
            "--rehearse/--no-rehearse",
            help="first the same tasks at micro size; default: where this training has never succeeded on the server",
        ),
    ] = None,
    endpoint: Annotated[str, ENDPOINT] = "",
    namespace: Annotated[str, NAMESPACE] = "",
    service_account: Annotated[str, ACCOUNT] = "",
) -> None:
    """Run a pipeline on Kubeflow Pipelines, after a rehearsal at micro size and a forecast of the GPU hours."""
    from pipelines.submit import SubmitOptions
    from pipelines.submit import submit as submit_run

    options = SubmitOptions(
        pipeline, profile, seed, occasion, model, champion, version, upload, wait, endpoint, namespace, service_account,
        rehearse,
    )  # fmt: skip
    raise typer.Exit(submit_run(options, Console()))


@schedules.command("set")
def schedule_set(
    name: Annotated[str, typer.Argument(help="name of the schedule")],
    cron: Annotated[str, typer.Option(help="six fields: second minute hour day-of-month month day-of-week")],
    pipeline: Annotated[str, PIPELINE] = "retraining",
    profile: Annotated[str, PROFILE] = "nano",
    version: Annotated[str, VERSION] = "",
    upload: Annotated[bool, UPLOAD] = True,
    endpoint: Annotated[str, ENDPOINT] = "",
    namespace: Annotated[str, NAMESPACE] = "",
    service_account: Annotated[str, ACCOUNT] = "",
) -> None:
    """Make the schedule of this name what is said here; doing it twice changes nothing."""
    from pipelines.schedule import ScheduleOptions, set_schedule

    options = ScheduleOptions(name, cron, pipeline, profile, version, upload, endpoint, namespace, service_account)
    raise typer.Exit(set_schedule(options, Console()))


@schedules.command("list")
def schedule_list(endpoint: Annotated[str, ENDPOINT] = "", namespace: Annotated[str, NAMESPACE] = "") -> None:
    """List the schedules."""
    from pipelines.schedule import list_schedules

    raise typer.Exit(list_schedules(endpoint, namespace, Console()))


@schedules.command("remove")
def schedule_remove(
    name: Annotated[str, typer.Argument(help="name of the schedule")],
    id_: Annotated[str, typer.Option("--id", help="which, where several have the name")] = "",
    endpoint: Annotated[str, ENDPOINT] = "",
    namespace: Annotated[str, NAMESPACE] = "",
) -> None:
    """Remove a schedule; the runs that it started stay."""
    from pipelines.schedule import remove_schedule

    raise typer.Exit(remove_schedule(name, id_, endpoint, namespace, Console()))


@app.command("profiles")
def profiles_() -> None:
    """List the profiles."""
    from pipelines import profiles

    for name in profiles.names():
        print(f"{name:12} {profiles.load(name).description}")


@app.command()
def serve(
    model: Annotated[str, typer.Option(help="models:/NAME@ALIAS, models:/NAME/VERSION, or a checkpoint folder")] = (
        "models:/sparseline-nano@champion"
    ),
    runs: Annotated[Path, RUNS] = Path("runs"),
    store: Annotated[str, typer.Option(help="the store of the runs, as in `sparseline run`")] = "",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0: a free one")] = 8080,
) -> None:
    """Serve a model of this machine's registry: an OpenAI-compatible API."""
    from pipelines.run import local_settings
    from pipelines.run import serve as serve_model

    raise typer.Exit(serve_model(local_settings(runs, store), model, ["--host", host, "--port", str(port)]))


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="champion, candidate, previous, a version number, or models:/...")],
    runs: Annotated[Path, RUNS] = Path("runs"),
    store: Annotated[str, typer.Option(help="the store of the runs, as in `sparseline run`")] = "",
    name: Annotated[str, typer.Option(help="registered model")] = "sparseline-nano",
    sample: Annotated[int, typer.Option(min=0, help="episodes to generate again with the checkpoints")] = 32,
    seed: Annotated[int | None, typer.Option(min=0, help="seed that draws them; default: another each time")] = None,
    digest: Annotated[str, typer.Option(help="sha256 that the checkpoint's manifest must have")] = "",
) -> None:
    """Compute a model's evaluation and the gate's verdict again from the recorded evidence."""
    import secrets

    from pipelines.run import local_settings
    from pipelines.verify import verify as verify_model

    settings = local_settings(runs, store).model_copy(update={"model": name})
    drawn = secrets.randbelow(1 << 31) if seed is None else seed
    raise typer.Exit(verify_model(settings, model, sample=sample, seed=drawn, console=Console(), digest=digest))


@app.command()
def release(
    values: Annotated[
        str, typer.Argument(help="the overlay's values, as the repository names the file", metavar="VALUES")
    ],
    model: Annotated[str, typer.Option(help="champion, candidate, previous, a version number, or models:/...")] = (
        "champion"
    ),
    repository: Annotated[str, typer.Option(help="a Git repository: a folder or a URL")] = ".",
    base: Annotated[str, typer.Option(help="branch that the cluster follows")] = "main",
    branch: Annotated[str, typer.Option(help="branch to push; default: release/MODEL-VERSION")] = "",
    commit: Annotated[bool, typer.Option("--commit", help="push it; without, it is only shown")] = False,
    author: Annotated[str, typer.Option(help="of the commit, NAME <MAIL>")] = "Sparseline <sparseline@localhost>",
    runs: Annotated[Path, RUNS] = Path("runs"),
    store: Annotated[str, typer.Option(help="the store of the runs, as in `sparseline run`")] = "",
    name: Annotated[str, typer.Option(help="registered model")] = "sparseline-nano",
    sample: Annotated[int, typer.Option(min=0, help="episodes to generate again with the checkpoints")] = 32,
) -> None:
    """Show, or push with --commit, the commit that makes an environment serve a verified model version.

    Example: sparseline release manifests/overlays/prod/values.yaml --repository https://git.example.com/platform
    (SPARSELINE_GIT_USERNAME and SPARSELINE_GIT_PASSWORD where it asks who you are).
    """
    import secrets

    from pipelines.release import Place
    from pipelines.release import release as release_model
    from pipelines.run import local_settings

    settings = local_settings(runs, store).model_copy(update={"model": name})
    raise typer.Exit(
        release_model(
            settings,
            model,
            Place(repository, base, values),
            branch=branch,
            author=author,
            commit=commit,
            sample=sample,
            seed=secrets.randbelow(1 << 31),
            console=Console(),
        )
    )


DATABASE = typer.Option(
    help="MLflow's database, sqlite:///FILE or postgresql://...; default: that of the runs",
    envvar="SPARSELINE_DATABASE",
)
FILES = typer.Option(help="folder of what MLflow keeps beside its database; default: that of the runs")


@app.command()
def backup(
    destination: Annotated[str, typer.Argument(help="a directory, or s3://BUCKET/PREFIX of another store")],
    runs: Annotated[Path, RUNS] = Path("runs"),
    store: Annotated[str, typer.Option(help="the store of the runs, as in `sparseline run`")] = "",
    database: Annotated[str, DATABASE] = "",
    files: Annotated[Path | None, FILES] = None,
    endpoint: Annotated[str, ENDPOINT] = "",
    namespace: Annotated[str, NAMESPACE] = "",
    keep: Annotated[int, typer.Option(min=0, help="backups to keep there; 0: all")] = 0,
) -> None:
    """Save MLflow's database, the store and the schedules, at one moment.

    Example: sparseline backup s3://backups/sparseline --keep 14 (SPARSELINE_BACKUP_S3_ENDPOINT,
    SPARSELINE_BACKUP_ACCESS_KEY_ID and SPARSELINE_BACKUP_SECRET_ACCESS_KEY, where they are not those of the store).
    """
    from pipelines.backup import backup as make_backup

    make_backup(_places(runs, store, database, files, endpoint, namespace), destination, keep=keep, console=Console())


@app.command()
def restore(
    source: Annotated[str, typer.Argument(help="where `sparseline backup` wrote")],
    backup_id: Annotated[str, typer.Option("--backup", help="id of the backup; default: the newest")] = "",
    runs: Annotated[Path, RUNS] = Path("runs"),
    store: Annotated[str, typer.Option(help="the store of the runs, as in `sparseline run`")] = "",
    database: Annotated[str, DATABASE] = "",
    files: Annotated[Path | None, FILES] = None,
    endpoint: Annotated[str, ENDPOINT] = "",
    namespace: Annotated[str, NAMESPACE] = "",
) -> None:
    """Fill an empty MLflow, the store and the schedules from a backup; nothing is overwritten."""
    from pipelines.backup import restore as restore_backup

    restore_backup(_places(runs, store, database, files, endpoint, namespace), source, backup_id, Console())


def _places(runs: Path, store: str, database: str, files: Path | None, endpoint: str, namespace: str) -> Any:
    from pipelines.backup import Places
    from pipelines.run import local_settings

    own = runs.resolve()
    return Places(
        local_settings(runs, store),
        database or f"sqlite:///{own / 'mlflow.db'}",
        files or (None if database else own / "mlflow-artifacts"),
        endpoint,
        namespace,
    )


@app.command()
def replay(
    run: Annotated[str, typer.Argument(help="id, the beginning of one, or latest")],
    step: Annotated[int, typer.Argument(min=1, help="step of its post-training, counted from 1")],
    runs: Annotated[Path, RUNS] = Path("runs"),
    store: Annotated[str, typer.Option(help="the store of the runs, as in `sparseline run`")] = "",
) -> None:
    """Execute an RL step again from its records, bitwise, and find where engine and learner part."""
    from pipelines.replay import replay_step
    from pipelines.run import local_settings

    raise typer.Exit(replay_step(local_settings(runs, store), run, step, Console()))


@app.command()
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="look at the cluster of the kubeconfig")] = False,
    profile: Annotated[str, PROFILE] = "nano",
    platform: Annotated[str, typer.Option(help="namespace of MLflow, store and serving")] = "sparseline",
    runs: Annotated[str, typer.Option(help="namespace in which pipelines run")] = "kubeflow",
    context: Annotated[str, typer.Option(help="context of the kubeconfig; default: the current one")] = "",
) -> None:
    """What is missing, on this machine or on a cluster, and the command that fixes it."""
    from pipelines import cluster_doctor
    from pipelines import doctor as machine_doctor

    if cluster:
        raise typer.Exit(cluster_doctor.doctor(profile, platform, runs, context, Console()))
    raise typer.Exit(machine_doctor.main())


@app.command()
def drill(
    profile: Annotated[str, PROFILE] = "micro",
    seed: Annotated[int | None, typer.Option(min=0, help="of moments and victims; default: another each time")] = None,
    fault: Annotated[
        list[str] | None, typer.Option(help="kill, stop, s3-away, disk-full or clock; may be repeated; default: all")
    ] = None,
    times: Annotated[int, typer.Option(min=1, help="of each kind")] = 1,
    output: Annotated[Path, typer.Option(help="folder of drill.json and drill.html")] = Path("drill"),
) -> None:
    """Hold a game day: run a profile, disturb it by faults, check what comes out and how long it takes to recover."""
    import secrets

    from pipelines.drill import DrillOptions
    from pipelines.drill import drill as hold_drill

    drawn = secrets.randbelow(1 << 31) if seed is None else seed
    raise typer.Exit(hold_drill(DrillOptions(profile, drawn, fault or [], times, output), Console()))


@made.command("list")
def runs_list(runs: Annotated[Path, RUNS] = Path("runs")) -> None:
    """List all runs: what, status, time, pass@1 before and after RL."""
    from pipelines.runs import list_runs

    raise typer.Exit(list_runs(runs, Console()))


@made.command("show")
def runs_show(
    run: Annotated[str, typer.Argument(help="id, the beginning of one, or latest")] = "latest",
    runs: Annotated[Path, RUNS] = Path("runs"),
) -> None:
    """Show the table of a run and where its pages are."""
    from pipelines.runs import show_run

    raise typer.Exit(show_run(runs, run, Console()))


@made.command("compare")
def runs_compare(
    first: Annotated[str, typer.Argument(help="id, the beginning of one, or latest")],
    second: Annotated[str, typer.Argument(help="id, the beginning of one, or latest")],
    runs: Annotated[Path, RUNS] = Path("runs"),
) -> None:
    """Show the numbers of two runs side by side, and the settings in which they differ."""
    from pipelines.runs import compare_runs

    raise typer.Exit(compare_runs(runs, first, second, Console()))


@made.command("rm")
def runs_remove(
    run: Annotated[list[str], typer.Argument(help="ids, or beginnings of them")],
    runs: Annotated[Path, RUNS] = Path("runs"),
) -> None:
    """Remove the folders of runs. What lies in the store stays until `sparseline gc --delete`."""
    from pipelines.runs import remove_runs

    raise typer.Exit(remove_runs(runs, run, Console()))


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="remove it; without this it is only shown")] = False,
    runs: Annotated[Path, RUNS] = Path("runs"),
    store: Annotated[str, typer.Option(help="the store of the runs, as in `sparseline run`")] = "",
) -> None:
    """Show what lies in this machine's store that no run and no registered version refers to."""
    from pipelines.garbage import collect_garbage
    from pipelines.run import local_settings

    raise typer.Exit(collect_garbage(local_settings(runs, store), delete, Console()))


@app.command()
def ui(
    runs: Annotated[Path, RUNS] = Path("runs"),
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port on 127.0.0.1")] = 5000,
) -> None:
    """Open MLflow on the runs of this machine."""
    from components.runtime import processes
    from components.runtime.settings import NO_USAGE_REPORTING

    database = (runs / "mlflow.db").resolve()
    if not database.is_file():
        raise InputError(f"{database} does not exist; run `sparseline run` first, or give --runs")
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise InputError(f"port {port} of 127.0.0.1 is in use; give another one by --port") from error
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{database}",
        "--default-artifact-root", (database.parent / "mlflow-artifacts").as_uri(),
    ]  # fmt: skip
    print(f"MLflow: http://127.0.0.1:{port}  (Ctrl-C ends it)")
    server = processes.start(command, environment={**os.environ, **NO_USAGE_REPORTING})
    try:
        code = server.wait()
    except KeyboardInterrupt:
        code = 0
    finally:
        processes.stop(server)
    raise typer.Exit(code)


def _sigterm(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _check_text(arguments: Sequence[str]) -> None:
    """Raises InputError for an argument that is no text: bytes that are not UTF-8 come as lone surrogates."""
    for argument in arguments:
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in argument):
            raise InputError(f"the argument {argument!r} holds bytes that are no text in UTF-8")


def main(arguments: list[str] | None = None) -> None:
    """Entry point: exit code 0, 1 fault, 2 bad input, 3 rejected by the gate, 130 stopped."""
    signal.signal(signal.SIGTERM, _sigterm)
    try:
        _check_text(sys.argv[1:] if arguments is None else arguments)
        code = app(arguments, standalone_mode=False)
    except InputError as error:
        print(f"sparseline: {error}", file=sys.stderr)
        sys.exit(errors.EXIT_INPUT)
    except KeyboardInterrupt:
        print("sparseline: stopped", file=sys.stderr)
        sys.exit(errors.EXIT_INTERRUPTED)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            print(f"sparseline: {str(error.filename)[:60]}...: a file name of this length cannot be", file=sys.stderr)
            sys.exit(errors.EXIT_INPUT)
        show = getattr(error, "show", None)
        if show is not None:  # wrong use of an option: click's own message
            show()
            sys.exit(errors.EXIT_INPUT)
        traceback.print_exc()
        sys.exit(errors.EXIT_FAULT)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
