"""The HTML report of a run, drawn from its summary, the stages' curves and the evaluation's own file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.evaluation.page import FAMILY_HEADER, compute_curve_figures, evaluation_figures, family_row
from components.runtime.contracts import Pointer
from components.runtime.curves import curve_figures
from components.runtime.object_store import ObjectStore, key_of
from components.runtime.report import html_table, line_figure, text_block, tiles, write_page
from components.runtime.tracking import read_metrics
from pipelines.display import duration
from pipelines.summary import key_numbers, look_up
from pipelines.watch import RunWatch

TRAINING = ("pretraining", "post_training")
COST_HEADER = ["stage", "core seconds", "GPU seconds", "peak memory, GB", "read from the store, MB", "written, MB"]


def write(directory: Path, summary: Mapping[str, Any], watch: RunWatch, store: ObjectStore) -> Path:
    """Write `report.html` into the run's folder. Draws whatever the run got to. Returns its path."""
    evaluation = read_evaluation(watch, store)
    figures = [*training_figures(watch), *compute_figures(watch, evaluation), *evaluation_figures(evaluation)]
    parts = [tiles(headline(summary))]
    if figures:
        parts += ["<h2>Plots</h2>", f'<div class="figures">{"".join(figures)}</div>']
    rows = [
        [
            stage["name"],
            "cached" if stage["cached"] else duration(stage["seconds"]),
            key_numbers(stage["name"], stage["summary"]),
        ]
        for stage in summary["stages"]
    ]
    parts += ["<h2>Stages</h2>", html_table(["stage", "time", "key numbers"], rows, numbers=[1])]
    costs = [cost_row(stage["name"], stage["cost"]) for stage in summary["stages"] if stage.get("cost")]
    if costs:
        parts += ["<h2>Cost</h2>", html_table(COST_HEADER, costs, numbers=[1, 2, 3, 4, 5])]
    families = look_up(evaluation, "pass_at_1.families")
    if families:
        told = [family_row(name, rates) for name, rates in families.items()]
        parts += ["<h2>Families</h2>", html_table(FAMILY_HEADER, told, numbers=[1, 2, 3, 4, 5])]
    rules = (summary.get("gate") or {}).get("rules", [])
    if rules:
        told = [["holds" if rule["holds"] else "fails", rule["name"], rule["explanation"]] for rule in rules]
        parts += ["<h2>Gate</h2>", html_table(["verdict", "rule", "numbers"], told)]
    if watch.episode:
        stage, text = watch.episode
        parts += [f"<h2>An episode ({html.escape(stage)})</h2>", text_block(text)]
    lead = f"{summary['profile']}, seed {summary['seed']}: {summary['status']}, {duration(summary['wall_seconds'])}"
    return write_page(directory / "report.html", f"Sparseline run {summary['run_id']}", parts, lead=lead)


def cost_row(stage: str, cost: Mapping[str, float]) -> list[str]:
    """What a stage cost when it ran, as a row under `COST_HEADER`."""
    return [
        stage,
        f"{cost['core_seconds']:.1f}",
        f"{cost['gpu_seconds']:.1f}",
        f"{cost['peak_memory_bytes'] / 1e9:.2f}",
        f"{cost['bytes_read'] / 1e6:.1f}",
        f"{cost['bytes_written'] / 1e6:.1f}",
    ]


def read_evaluation(watch: RunWatch, store: ObjectStore) -> dict[str, Any]:
    """evaluation.json of this run, or an empty mapping when there was no evaluation."""
    view = watch.stages.get("evaluation")
    pointer = look_up(view.record, "outputs.evaluation") if view else None
    if pointer is None:
        return {}
    uri = Pointer.model_validate(pointer).uri
    return dict(json.loads(store.get_bytes(f"{key_of(store, uri)}/evaluation.json")))


def headline(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers that a reader wants first."""
    found: list[tuple[str, str]] = []
    verdict = look_up(summary, "gate.verdict")
    if verdict:
        found.append((str(verdict), "gate"))
    before, after = look_up(summary, "pass_at_1.before.macro"), look_up(summary, "pass_at_1.after.macro")
    if before is not None and after is not None:
        found.append((f"{before:.2f} → {after:.2f}", "held-out pass@1, before and after RL"))
    difference = look_up(summary, "pass_at_1.difference")
    if difference:
        found.append(
            (
                f"{difference['mean']:+.2f}",
                f"difference, interval {difference['low']:+.2f} to {difference['high']:+.2f}",
            )
        )
    over = look_up(summary, "pass_at_1.over_best_temperature")
    if over:
        told = f"over the model before RL at its best temperature, {over['low']:+.2f} to {over['high']:+.2f}"
        found.append((f"{over['mean']:+.2f}", told))
    unseen = look_up(summary, "pass_at_1.unseen_environments")
    if unseen:
        gain = unseen["difference"]
        told = f"on {unseen['environments']} unseen environments, {gain['low']:+.2f} to {gain['high']:+.2f}"
        found.append((f"{gain['mean']:+.2f}", told))
    recall = look_up(summary, "indexer_recall")
    if isinstance(recall, (int, float)):
        found.append((f"{recall:.3f}", "indexer recall of the word that answers"))
    dense, sparse = look_up(summary, "ce.dense"), look_up(summary, "ce.sparse")
    if dense is not None and sparse is not None:
        found.append((f"{sparse - dense:+.4f}", "nats per token, sparse minus dense attention"))
    if look_up(summary, "serving.episode_ok") is not None:
        found.append(("yes" if summary["serving"]["episode_ok"] else "no", "episode over the HTTP API"))
    found.append((duration(summary["wall_seconds"]), "whole run"))
    found.append((f"{summary['peak_rss_bytes'] / 1e9:.1f} GB", "peak memory, all processes"))
    return found


def training_figures(watch: RunWatch) -> list[str]:
    """Loss, KL and reward of the training stages, and pass@1 on validation."""
    stages = [name for name in TRAINING if name in watch.stages]
    return [
        figure
        for name in stages
        for figure in curve_figures(watch.stages[name].title, read_metrics(watch.stage_directory(name)))
    ]


def compute_figures(watch: RunWatch, evaluation: Mapping[str, Any]) -> list[str]:
    """What compute buys: validation pass@1 against rollouts of RL, pass@1 against tokens, pass@k against k."""
    figures = []
    curve = validation_by_rollouts(read_metrics(watch.stage_directory("post_training")))
    if len(curve) > 1:
        figures.append(
            line_figure(
                "RL compute", {"validation pass@1": curve}, x="rollouts trained on", y="share of episodes passed"
            )
        )
    figures += compute_curve_figures(evaluation)
    return figures


def validation_by_rollouts(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[float, float]]:
    """(rollouts trained on until then, validation pass@1) of post-training; empty when it recorded no such numbers."""
    trained, rates = curves.get("rl/trained_rollouts", []), curves.get("rl/validation_pass_at_1", [])
    if not trained:
        return []
    return [(sum(number for at, number in trained if at <= step), rate) for step, rate in rates]
