"""`sparseline runs`: the runs of this machine: list them, look at one, compare two, remove some."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from components.runtime.errors import InputError
from pipelines.results import rows, shown
from pipelines.run import only_run
from pipelines.summary import look_up, table

SUMMARY, CONFIGURATIONS = "summary.json", "configurations.json"


@dataclass(frozen=True)
class Run:
    """A run's folder and its summary; None where the run did not come to its end, or is still going on."""

    directory: Path
    summary: dict[str, Any] | None

    @property
    def id(self) -> str:
        return self.directory.name


def found(runs: Path) -> list[Run]:
    """The runs in this folder, oldest first."""
    made = []
    for directory in sorted(runs.iterdir()) if runs.is_dir() else ():
        if directory.is_symlink() or not (directory / CONFIGURATIONS).is_file():
            continue
        path = directory / SUMMARY
        made.append(Run(directory, json.loads(path.read_text()) if path.is_file() else None))
    return made


def named(runs: Path, name: str) -> Run:
    """The run of this id, the beginning of an id, or `latest`. Raises InputError for none, and for several."""
    all_runs = found(runs)
    if name == "latest" and (runs / "latest").exists():
        name = (runs / "latest").resolve().name
    hits = [run for run in all_runs if run.id == name] or [run for run in all_runs if name and run.id.startswith(name)]
    if len(hits) == 1:
        return hits[0]
    told = ", ".join(run.id for run in (hits or all_runs)[-10:]) or "none"
    raise InputError(f"{runs} has {len(hits) or 'no'} runs {name!r}; {'these are' if hits else 'there are'}: {told}")


def list_runs(runs: Path, console: Console) -> int:
    """One line a run."""
    made = Table(show_edge=False)
    for name in ("run", "what", "status"):
        made.add_column(name, no_wrap=True)
    for name in ("minutes", "pass@1"):
        made.add_column(name, justify="right", no_wrap=True)
    for run in found(runs):
        if run.summary is None:
            made.add_row(run.id, "", "no end", "", "")
            continue
        values = run.summary
        passed = [look_up(values, f"pass_at_1.{side}.macro") for side in ("before", "after")]
        made.add_row(
            run.id,
            f"{values.get('pipeline', 'training')} {values['profile']} {values['seed']}",
            values["status"],
            f"{values['wall_seconds'] / 60:.1f}",
            "" if None in passed else " to ".join(f"{value:.3f}" for value in passed),
        )
    console.print(made if made.row_count else f"{runs} holds no run; `sparseline run` makes one", soft_wrap=True)
    return 0


def show_run(runs: Path, name: str, console: Console) -> int:
    """The table that the run printed at its end, and where its pages are."""
    run = named(runs, name)
    if run.summary is None:
        raise InputError(f"the run {run.id} has not come to its end; its log is {run.directory / 'pipeline.log'}")
    console.print(table({"pipeline": "training", **run.summary}))
    for page in sorted([*run.directory.glob("*.html"), *run.directory.glob("stages/*/artifacts/*.html")]):
        console.print(str(page), soft_wrap=True)
    return 0


def compare_runs(runs: Path, first: str, second: str, console: Console) -> int:
    """The numbers of two runs side by side, and every setting in which they differ."""
    sides = [named(runs, name) for name in (first, second)]
    for run in sides:
        if run.summary is None:
            raise InputError(f"the run {run.id} has not come to its end: there is nothing to compare")
    summaries = [run.summary for run in sides if run.summary is not None]
    made = Table(show_edge=False)
    made.add_column("", no_wrap=True)
    for run in sides:
        made.add_column(run.id, justify="right")
    made.add_column("difference", justify="right")
    paths = {name: path for summary in summaries if "pass_at_1" in summary for name, path in rows([summary]).items()}
    for name, path in paths.items():
        values = [look_up(summary, path) for summary in summaries]
        if all(value is None for value in values):
            continue
        told = ["" if value is None else shown(value, path) for value in values]
        plain = all(isinstance(value, (int, float)) for value in values)
        scale = {"work_seconds": 1 / 60, "peak_rss_bytes": 1e-9}.get(path, 1.0)
        made.add_row(name, *told, f"{(values[1] - values[0]) * scale:+.3g}" if plain else "")
    console.print(made)
    settings = [
        dict(_flat(json.loads((run.directory / CONFIGURATIONS).read_text()))) | {"seed": summary["seed"]}
        for run, summary in zip(sides, summaries, strict=True)
    ]
    unlike = [key for key in sorted({*settings[0], *settings[1]}) if settings[0].get(key) != settings[1].get(key)]
    for key in unlike:
        console.print(f"{key}: {settings[0].get(key)} | {settings[1].get(key)}", soft_wrap=True)
    if not unlike:
        console.print("the same settings and seed")
    return 0


def remove_runs(runs: Path, names: Sequence[str], console: Console) -> int:
    """Remove the folders of runs; what they put into the store stays until `sparseline gc`.

    Raises InputError, and removes nothing, when a run goes on in this folder, or another run shows records of one of
    these (a stage that it took from the cache).
    """
    with only_run(runs):
        chosen = {run.id: run for run in (named(runs, name) for name in names)}
        for run in found(runs):
            shows = {link.resolve().parents[1].name for link in run.directory.glob("stages/*") if link.is_symlink()}
            needed = sorted(shows & set(chosen))
            if needed and run.id not in chosen:
                raise InputError(f"the run {run.id} shows stages of {', '.join(needed)}; remove it as well, or first")
        latest = runs / "latest"
        for run in chosen.values():
            if latest.is_symlink() and latest.resolve() == run.directory.resolve():
                latest.unlink()
            shutil.rmtree(run.directory)
            console.print(f"removed {run.directory}", soft_wrap=True)
        rest = found(runs)
        if rest and not latest.exists():
            latest.symlink_to(rest[-1].id, target_is_directory=True)
    return 0


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value
