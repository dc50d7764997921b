"""The HTML page of post-training: reward by family, the stabilisers at work, the same tasks before and after."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.post_training.validation import Validation
from components.runtime.report import html_table, line_figure, side_by_side, tiles, write_page

PAGE = "post_training.html"
PAIRS = 2  # validation tasks of a family that are shown
Curves = Mapping[str, Sequence[tuple[int, float]]]
# title, unit, curves by their name in the legend
FIGURES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Entropy and KL", "nats per sampled token", {"entropy": "rl/entropy", "KL to the start": "rl/kl"}),
    (
        "Ratio of learner to engine",
        "pi / pi_engine",
        {"mean less 1, before the first update": "rl/ratio_bias", "largest": "rl/ratio_max"},
    ),
    (
        "Masked and clipped",
        "share",
        {"sequences masked": "rl/masked_share", "tokens clipped": "rl/clipped_share"},
    ),
    (
        "Groups",
        "share of the batch, number",
        {
            "judged alike": "rl/zero_variance_groups",
            "faulty": "rl/faulty_groups",
            "staleness, versions": "rl/staleness",
        },
    ),
    (
        "Episodes",
        "a rollout",
        {"turns": "rl/turns", "tool errors": "rl/tool_errors", "share malformed": "rl/malformed_share"},
    ),
    ("Seconds of a step", "seconds", {"rollouts": "rl/rollout_seconds", "update": "rl/update_seconds"}),
)


def write_report(
    directory: Path, summary: Mapping[str, Any], curves: Curves, first: Validation, best: Validation
) -> Path:
    """Write `post_training.html`, one self-contained page. Returns its path."""
    figures = []
    for title, beginning in (("Reward of rollouts", "rl/reward"), ("Validation pass@1", "rl/validation_pass_at_1")):
        found = {
            name.removeprefix(beginning).removeprefix("/") or "all": points
            for name, points in curves.items()
            if name == beginning or name.startswith(f"{beginning}/")
        }
        if found:
            figures.append(line_figure(title, found, x="step", y="share of episodes"))
    for title, unit, names in FIGURES:
        found = {label: curves[name] for label, name in names.items() if name in curves}
        if found:
            figures.append(line_figure(title, found, x="step", y=unit))
    counts = {name: value for name, value in summary["ledger"].items() if name != "hash"}
    parts = [
        tiles(
            [
                (f"{first.macro:.2f} \u2192 {best.macro:.2f}", "validation pass@1, first and best"),
                (str(summary["best_step"]), "step of the best"),
                (f"{summary['trained_rollouts']} of {summary['rollouts']}", "rollouts trained on"),
                (f"{summary['logprob_gap']:.1e}", "engine against learner, nats, at most"),
                (summary["stopped_by"] or "none", "alarm"),
            ]
        ),
        f'<div class="figures">{"".join(figures)}</div>',
        "<h2>Ledger</h2>",
        html_table(
            ["prompt groups", "number"], [[n.replace("_", " "), str(v)] for n, v in counts.items()], numbers=[1]
        ),
        "<h2>The same validation tasks, first and best</h2>",
        *_pairs(first, best),
    ]
    return write_page(directory / PAGE, "Post-training", parts, lead=", ".join(best.by_family))


def _pairs(first: Validation, best: Validation) -> list[str]:
    """Of each family first the tasks that changed sides, then others."""
    families: dict[str, list[tuple[bool, str, str]]] = {}
    for before, after in zip(first.episodes, best.episodes, strict=True):
        changed = before["passed"] != after["passed"]
        families.setdefault(str(after["family"]), []).append((not changed, str(before["text"]), str(after["text"])))
    shown = []
    for family, pairs in sorted(families.items()):
        shown.append(f"<h3>{html.escape(family)}</h3>")
        shown += [side_by_side(left, right) for _, left, right in sorted(pairs, key=lambda pair: pair[0])[:PAIRS]]
    return shown
