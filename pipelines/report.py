"""The HTML report of a run, drawn from its summary, the stages' curves and the evaluation's own file."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.runtime.contracts import Pointer
from components.runtime.object_store import ObjectStore, key_of
from components.runtime.report import bar_figure, html_table, interval_figure, line_figure, tiles, write_page
from components.runtime.tracking import read_metrics
from pipelines.display import duration
from pipelines.summary import key_numbers, look_up
from pipelines.watch import RunWatch

TRAINING = ("pretraining", "post_training")


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
    families = look_up(evaluation, "pass_at_1.families")
    if families:
        header = ["family", "before (Wilson)", "after (Wilson)", "difference (paired)", "p", "p, Holm"]
        told = [family_row(name, rates) for name, rates in families.items()]
        parts += ["<h2>Families</h2>", html_table(header, told, numbers=[1, 2, 3, 4, 5])]
    rules = (summary.get("gate") or {}).get("rules", [])
    if rules:
        told = [["holds" if rule["holds"] else "fails", rule["name"], rule["explanation"]] for rule in rules]
        parts += ["<h2>Gate</h2>", html_table(["", "rule", "numbers"], told)]
    if watch.episode:
        stage, text = watch.episode
        parts += [f"<h2>An episode ({html.escape(stage)})</h2>", f"<pre>{html.escape(text)}</pre>"]
    lead = f"{summary['profile']}, seed {summary['seed']}: {summary['status']}, {duration(summary['wall_seconds'])}"
    return write_page(directory / "report.html", f"Sparseline run {summary['run_id']}", parts, lead=lead)


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
    figures = []
    for stage in (name for name in TRAINING if name in watch.stages):
        curves, phases = one_axis(read_metrics(watch.stage_directory(stage)))
        title = watch.stages[stage].title
        for label, words, unit in (
            ("loss", ("loss", "ce"), "nats per token"),
            ("KL", ("kl",), "nats"),
            ("reward", ("reward", "pass_at_1"), "share of episodes"),
        ):
            chosen = {name: points for name, points in curves.items() if is_about(name, words)}
            if chosen:
                figures.append(line_figure(f"{title}: {label}", chosen, x="step", y=unit, marks=phases))
    return figures


def one_axis(
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> tuple[dict[str, list[tuple[int, float]]], list[tuple[int, str]]]:
    """Curves named `phase/name` joined into one curve per name, and where each phase begins.

    Every phase counts its own steps from 0; on the joined axis a phase begins after the last step of the one before.
    """
    starts: dict[str, int] = {}
    end = 0
    for phase in dict.fromkeys(name.partition("/")[0] for name in curves):
        starts[phase] = end
        steps = [point[0] for name, points in curves.items() if name.partition("/")[0] == phase for point in points]
        end += max(steps) + 1
    joined: dict[str, list[tuple[int, float]]] = {}
    for name, points in curves.items():
        phase, _, short = name.partition("/")
        joined.setdefault(short or phase, []).extend((starts[phase] + step, value) for step, value in points)
    return joined, [(start, phase) for phase, start in starts.items()] if len(starts) > 1 else []


def is_about(name: str, words: tuple[str, ...]) -> bool:
    """Whether a curve's name has one of the words as a part: `sparse/lm_loss` is about `loss`, `scale` not `ce`."""
    parts = name.lower().replace("/", "_").replace(".", "_").replace("@", "_").split("_")
    return any(word in parts or ("_" in word and word in name.lower()) for word in words)


def family_row(name: str, rates: Mapping[str, Any]) -> list[str]:
    """A family's line of the table: rates with Wilson intervals, the paired difference, p-values."""
    sides = [rates["before_wilson"], rates["after_wilson"]]
    difference = rates["difference"]
    return [
        name,
        *(f"{side['mean']:.3f} ({side['low']:.3f} to {side['high']:.3f})" for side in sides),
        f"{difference['mean']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})",
        f"{rates['p_value']:.2g}",
        f"{rates['p_adjusted']:.2g}",
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
    compute = evaluation.get("compute") or {}
    for title, key, x in (
        ("Test-time compute: pass@1 within a token budget", "budget", "tokens of an episode at most"),
        ("Test-time compute: pass@k", "pass_at_k", "k, episodes of a task"),
    ):
        curves = {
            f"{player} RL": [(point["x"], point["rate"]["mean"]) for point in points]
            for player, points in (compute.get(key) or {}).items()
        }
        if curves:
            figures.append(line_figure(title, curves, x=x, y="share of tasks passed"))
    return figures


def validation_by_rollouts(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[float, float]]:
    """(rollouts trained on until then, validation pass@1) of post-training; empty when it recorded no such numbers."""
    trained, rates = curves.get("rl/trained_rollouts", []), curves.get("rl/validation_pass_at_1", [])
    if not trained:
        return []
    return [(sum(number for at, number in trained if at <= step), rate) for step, rate in rates]


def evaluation_figures(evaluation: Mapping[str, Any]) -> list[str]:
    """pass@1 before and after, cross-entropy by attention, recall by depth."""
    figures = []
    rates = evaluation.get("pass_at_1")
    if rates:
        rows = [
            (f"{side}, sampled", *(rates[side][key] for key in ("macro", "low", "high")))
            for side in ("before", "after")
        ]
        greedy = evaluation.get("greedy") or {}
        rows += [
            (f"{side}, greedy", *(greedy[side][key] for key in ("macro", "low", "high")))
            for side in ("before", "after")
            if side in greedy
        ]
        best = rates.get("before_best_temperature")
        if best:
            values = (best["test"][key] for key in ("macro", "low", "high"))
            rows.append((f"before, best temperature ({best['temperature']:g})", *values))
        figures.append(interval_figure("Held-out pass@1 before and after RL", rows, x="share of episodes passed"))
    kinds = ("dense", "sparse", "window", "random")
    groups = {
        name: [(kind, evaluation[key][kind]) for kind in kinds]
        for name, key in (("all words", "ce"), ("answers", "ce_answers"))
        if evaluation.get(key)
    }
    if groups:
        figures.append(
            bar_figure(
                "Cross-entropy by attention, same weights", groups, x="positions attended to", y="nats per token"
            )
        )
    depth = look_up(evaluation, "indexer_recall.depth")
    if depth:
        groups = {
            name: [(f"{one['low']}-{one['high'] - 1}", one[key]) for one in depth]
            for name, key in (("the word that answers", "answer_word"), ("the whole fact", "all_words"))
        }
        figures.append(bar_figure("Indexer recall by depth", groups, x="words between evidence and answer", y="recall"))
    return figures
