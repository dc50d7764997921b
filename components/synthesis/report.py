"""The HTML report of the synthesis stage: what was made, what the battery removed, who can play it, how it looks."""

from __future__ import annotations

import html
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.runtime.contracts import TaskRecord
from components.runtime.report import bar_figure, html_table, text_block, tiles, write_page
from components.synthesis.family import CAREFUL, Family
from components.synthesis.players import PLAYERS

_EXAMPLES = 2


def write_report(
    directory: Path,
    summary: Mapping[str, Any],
    reports: Mapping[str, Mapping[str, Any]],
    families: Sequence[Family],
    tasks: Sequence[TaskRecord],
) -> Path:
    """Write `synthesis.html`, one self-contained page. Returns its path."""
    parts = [
        tiles(
            [
                (str(sum(summary[f"{split}_tasks"] for split in ("train", "validation", "test"))), "tasks"),
                (str(summary["demonstrations"]), "demonstrations"),
                (f"{summary['wrong_share']:.0%}", "of them wrong on purpose"),
                (str(summary["documents"]), "documents"),
                (str(sum(summary["battery_removed"].values())), "tasks that the battery removed"),
                (str(sum(summary["near_duplicates"].values())), "near-duplicates removed across splits"),
            ]
        ),
        "<h2>Families</h2>",
        _families(reports, tasks),
        "<h2>Validation battery</h2>",
        "<p>Tasks that each check removed; a task is counted at the first check that it failed.</p>",
        _battery(reports),
        "<h2>Players without a model</h2>",
        "<p>On held-out tasks: pass@1, pass@16 and mean words of an episode.</p>",
        _players(reports),
        f'<div class="figures">{_figures(reports, tasks)}</div>',
    ]
    for family in families:
        parts += [f"<h2>{html.escape(family.name)}: tasks with their solution</h2>", *_examples(family, tasks)]
    return write_page(directory / "synthesis.html", "Synthesis", parts, lead=", ".join(reports))


def _figures(reports: Mapping[str, Mapping[str, Any]], tasks: Sequence[TaskRecord]) -> str:
    players = {
        player: [(name, report["players"][player]["pass_at_1"]) for name, report in reports.items()]
        for player in PLAYERS
    }
    return bar_figure("Players without a model", players, x="family", y="pass@1") + bar_figure(
        "Calls of the reference solution", _histogram(tasks, list(reports)), x="calls", y="share of the tasks"
    )


def _families(reports: Mapping[str, Mapping[str, Any]], tasks: Sequence[TaskRecord]) -> str:
    counts: Counter[tuple[str, str]] = Counter((task.environment, task.split) for task in tasks)
    rows = []
    for name, report in reports.items():
        splits = ("train", "validation", "test")
        rows.append(
            [
                name,
                *(str(counts[name, split]) for split in splits),
                *(str(report["templates"][split]) for split in splits),
                f"{report['near_duplicates']['test_sharing_13_words_with_train']:.3f}",
            ]
        )
    header = ["family", "train", "validation", "test", "train templates", "validation templates", "test templates"]
    return html_table([*header, "test tasks sharing 13 words with train"], rows, numbers=range(1, 8))


def _battery(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a check, a column a family."""
    rows = [["checked", *(str(report["checked"]) for report in reports.values())]]
    for check in next(iter(reports.values()))["removed"]:
        rows.append([check, *(str(report["removed"][check]) for report in reports.values())])
    lost = [sum(report["near_duplicates"]["removed"].values()) for report in reports.values()]
    rows += [
        ["near-duplicate", *map(str, lost)],
        ["kept", *(str(report["kept"] - gone) for report, gone in zip(reports.values(), lost, strict=True))],
        ["share of mutants that failed", *(f"{report['mutants_failed_share']:.3f}" for report in reports.values())],
    ]
    return html_table(["check", *reports], rows, numbers=range(1, len(reports) + 1))


def _players(reports: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, report in reports.items():
        for player in PLAYERS:
            one = report["players"][player]
            rows.append([name, player, f"{one['pass_at_1']:.3f}", f"{one['pass_at_16']:.3f}", f"{one['tokens']:.0f}"])
    return html_table(["family", "player", "pass@1", "pass@16", "words"], rows, numbers=[2, 3, 4])


def _histogram(tasks: Sequence[TaskRecord], names: Sequence[str]) -> dict[str, list[tuple[str, float]]]:
    """Share of each family's tasks by the number of calls of the reference."""
    most = max(len(task.solution) for task in tasks)
    found = {}
    for name in names:
        counts = Counter(len(task.solution) for task in tasks if task.environment == name)
        total = max(1, sum(counts.values()))
        found[name] = [(str(calls), counts[calls] / total) for calls in range(1, most + 1)]
    return found


def _examples(family: Family, tasks: Sequence[TaskRecord]) -> list[str]:
    """A few held-out tasks, played by the careful teacher."""
    mine = [task for task in tasks if task.environment == family.name and task.split == "test"]
    chosen = random.Random(f"synthesis/report/{family.name}").sample(mine, min(_EXAMPLES, len(mine)))
    shown = []
    for task in chosen:
        lines = [task.template]
        for message in family.play(task, CAREFUL, random.Random(0)).messages:
            calls = [f"{call.name}({', '.join(map(str, call.arguments.values()))})" for call in message.tool_calls]
            lines.append(f"{message.role:>10}  {' '.join([message.content, *calls]).strip()}")
        shown.append(text_block("\n".join(lines)))
    return shown
