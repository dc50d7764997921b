"""The commands of `sparseline` for a cluster: compile, submit, schedule, release, backup, restore, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from components.runtime import errors
from components.runtime.errors import InputError
from pipelines.cli_options import ACCOUNT, ENDPOINT, NAMESPACE, PIPELINE, PROFILE, RUNS, UPLOAD, VERSION

app = typer.Typer()
schedules = typer.Typer(help="Recurring runs on Kubeflow Pipelines, by name.", no_args_is_help=True)
app.add_typer(schedules, name="schedule")
DATABASE = typer.Option(
    help="MLflow's database, sqlite:///FILE or postgresql://...; default: that of the runs",
    envvar="SPARSELINE_DATABASE",
)
FILES = typer.Option(help="folder of what MLflow keeps beside its database; default: that of the runs")


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
