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
from pipelines import cli_platform
from pipelines.cli_options import PROFILE, RUNS

app = typer.Typer(
    name="sparseline",
    help="Turns a dense language model into a long-context agent with DeepSeek Sparse Attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_platform.app)
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
