"""The HTML page of the evaluation: before and after by family, what changed task by task, dense against sparse."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.evaluation.play import Item
from components.evaluation.report import EvaluationReport
from components.runtime.report import bar_figure, html_table, interval_figure, line_figure, side_by_side, write_page

PAGE = "evaluation.html"
FLIPS = 2  # tasks of a family that RL gained, and as many that it lost, to be read
FAMILY_HEADER = ("family", "before (Wilson)", "after (Wilson)", "difference (paired)", "p", "p, Holm")


def write_evaluation_page(directory: Path, report: EvaluationReport, items: Sequence[Item]) -> Path:
    """Write `evaluation.html`, one self-contained page. Returns its path."""
    values = report.model_dump()
    rows = [family_row(name, rates) for name, rates in values["pass_at_1"]["families"].items()]
    parts = [
        f'<div class="figures">{"".join([*evaluation_figures(values), *compute_curve_figures(values)])}</div>',
        "<h2>Families</h2>",
        html_table(FAMILY_HEADER, rows, numbers=[1, 2, 3, 4, 5]),
        "<h2>What RL changed</h2>",
        "<p>The same held-out task with the same random numbers, before (left) and after RL (right).</p>",
        *_flips(items),
    ]
    if report.faults:
        parts += ["<h2>Faulty episodes</h2>", html_table(["task and reason"], [[fault] for fault in report.faults])]
    lead = f"{report.templates} held-out programs, seed {report.seed}, intervals of {report.confidence:.0%}"
    return write_page(directory / PAGE, "Evaluation", parts, lead=lead)


def _flips(items: Sequence[Item]) -> list[str]:
    sides = {
        name: {
            item.task: item for item in items if (item.player, item.measure, item.temperature) == (name, "sampled", 1)
        }
        for name in ("before", "after")
    }
    shown = []
    pairs = [(sides["before"][task], after) for task, after in sides["after"].items() if task in sides["before"]]
    for family in sorted({after.family for _, after in pairs}):
        own = [(before, after) for before, after in pairs if after.family == family]
        gained = [pair for pair in own if not pair[0].reward and pair[1].reward]
        lost = [pair for pair in own if pair[0].reward and not pair[1].reward]
        shown.append(f"<h3>{html.escape(family)}: {len(gained)} gained, {len(lost)} lost, of {len(own)}</h3>")
        for before, after in [*gained[:FLIPS], *lost[:FLIPS]]:
            shown.append(side_by_side(before.transcript, after.transcript))
    return shown


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


def compute_curve_figures(evaluation: Mapping[str, Any]) -> list[str]:
    """What more test-time compute buys: pass@1 against tokens, pass@k against k."""
    figures = []
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
    depth = (evaluation.get("indexer_recall") or {}).get("depth")
    if depth:
        groups = {
            name: [(f"{one['low']}-{one['high'] - 1}", one[key]) for one in depth]
            for name, key in (("the word that answers", "answer_word"), ("the whole fact", "all_words"))
        }
        figures.append(bar_figure("Indexer recall by depth", groups, x="words between evidence and answer", y="recall"))
    return figures
