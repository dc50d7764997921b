"""The numbers of a run: `summary.json`, and the table that a person reads at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from pipelines.display import duration
from pipelines.watch import RunWatch

# What a table row says of a stage: (label, path into the stage's summary). Missing numbers are left out.
KEY_NUMBERS: dict[str, list[tuple[str, str]]] = {
    "origin": [("model", "model"), ("champion version", "champion_version"), ("fresh seed", "fresh_seed")],
    "synthesis": [
        ("tasks", "train_tasks"),
        ("held-out templates", "test_templates"),
        ("demonstrations", "demonstrations"),
        ("documents", "documents"),
    ],
    "pretraining": [
        ("parameters", "parameters"),
        ("loss dense", "dense_demonstration_loss"),
        ("sparse", "sparse_demonstration_loss"),
        ("answers in documents", "sparse_document_accuracy"),
    ],
    "post_training": [
        ("validation pass@1 before", "validation_pass_at_1_before"),
        ("best", "validation_pass_at_1_best"),
        ("at step", "best_step"),
        ("rollouts", "rollouts"),
    ],
    "evaluation": [
        ("pass@1 before", "pass_at_1.before.macro"),
        ("after", "pass_at_1.after.macro"),
        ("difference", "pass_at_1.difference.mean"),
        ("over best temperature", "pass_at_1.over_best_temperature.mean"),
        ("on unseen environments", "pass_at_1.unseen_environments.difference.mean"),
        ("indexer recall", "indexer_recall"),
        ("sparse - dense CE", "ce.gap"),
    ],
    "champion": [("compared", "compared"), ("difference", "difference.mean")],
    "gate": [("verdict", "verdict")],
    "promotion": [("model", "model"), ("version", "version")],
    "serving": [("episode ok", "episode_ok"), ("passed", "passed"), ("tokens/s", "tokens_per_second")],
}


def look_up(values: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path, or None."""
    for key in path.split("."):
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return values


def summarise(
    watch: RunWatch,
    *,
    run_id: str,
    profile: str,
    seed: int,
    wall_seconds: float,
    peak_bytes: int,
    status: str,
    pipeline: str = "training",
) -> dict[str, Any]:
    """summary.json: what the whole run did, and the summary of each stage beside it.

    The evaluation's numbers stand at the top level (`pass_at_1`, `greedy`, `ce`, ...), the gate's and the serving
    check's under their names. `peak_rss_bytes` is the sum over all processes, each shared page counted once (PSS).
    """
    stages = []
    for view in watch.stages.values():
        if view.state in ("waiting", "running"):
            continue
        stages.append(
            {
                "name": view.name,
                "seconds": round(view.seconds, 3),
                "cached": view.state == "cached",
                "state": view.state,
                "work_seconds": view.record.get("seconds"),
                "cost": view.record.get("cost", {}),
                "summary": view.record.get("summary", {}),
            }
        )
    records = {view.name: view.record.get("summary", {}) for view in watch.stages.values()}
    summary: dict[str, Any] = {
        "run_id": run_id,
        "pipeline": pipeline,
        "profile": profile,
        "seed": seed,
        "status": status,
        "wall_seconds": round(wall_seconds, 3),
        "peak_rss_bytes": peak_bytes,
        "stages": stages,
    }
    summary.update({name: value for name, value in records.get("evaluation", {}).items() if name not in summary})
    for name in ("gate", "serving"):
        if records.get(name):
            summary[name] = records[name]
    return summary


def table(summary: Mapping[str, Any]) -> Table:
    """One row a stage: time and key numbers."""
    what = f"{summary['pipeline']} of {summary['profile']}, seed {summary['seed']}"
    made = Table(title=f"{what}: {summary['status']}", title_justify="left")
    made.add_column("stage")
    made.add_column("time", justify="right", no_wrap=True)
    made.add_column("key numbers")
    for stage in summary["stages"]:
        time = "cached" if stage["cached"] else duration(stage["seconds"])
        numbers = key_numbers(stage["name"], stage["summary"])
        made.add_row(stage["name"], time, "failed" if stage["state"] == "failed" else numbers)
    made.add_row(
        "whole run", duration(summary["wall_seconds"]), f"peak memory {summary['peak_rss_bytes'] / 1e9:.2f} GB"
    )
    return made


def key_numbers(name: str, values: Mapping[str, Any]) -> str:
    shown = []
    for label, path in KEY_NUMBERS.get(name, []):
        value = look_up(values, path)
        if isinstance(value, Mapping):
            value = value.get("mean", value.get("macro"))
        if value is not None:
            shown.append(f"{label} {value:.4g}" if isinstance(value, float) else f"{label} {value}")
    return ", ".join(shown)
