"""`sparseline drill`: a game day. A profile is run and disturbed by each kind of fault, and has to come out right.

Writes `drill.json` (hardware, versions, every case with its seed, moment, exit codes and recovery time) and
`drill.html`. On a schedule, e.g. by cron: `0 6 * * 6 sparseline drill --output /var/log/sparseline/drill`; without
--seed each drill draws other moments and victims. The machinery is `pipelines/faults/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from components.runtime import errors
from components.runtime.errors import InputError, disk_errors
from components.runtime.report import bar_figure, html_table, tiles, write_page
from pipelines import profiles
from pipelines.faults.campaign import Plan, carry_out
from pipelines.faults.case import own_mounts
from pipelines.faults.kinds import KINDS

RESULT, PAGE = "drill.json", "drill.html"
HEADER = ["fault", "moment", "what", "exit codes", "first new step", "end", "verdict"]


@dataclass(frozen=True)
class DrillOptions:
    """What the command line said. `faults` empty: all kinds that this machine can do; `times` of each."""

    profile: str
    seed: int
    faults: Sequence[str]
    times: int
    output: Path


def drill(options: DrillOptions, console: Console) -> int:
    """Hold the drill. Returns 0 when every run came out right, 3 when one did not.

    Raises InputError for an unknown profile or fault, or one that this machine cannot do and that was asked for.
    """
    profiles.load(options.profile)
    unknown = set(options.faults) - set(KINDS)
    if unknown:
        raise InputError(f"--fault: unknown {', '.join(sorted(unknown))}; known: {', '.join(KINDS)}")
    own_mounts()
    left_out = {} if options.faults else {kind: why for kind in KINDS if (why := KINDS[kind].possible())}
    for kind, why in left_out.items():
        console.print(f"{kind} is left out: {why}", markup=False, soft_wrap=True)
    kinds = [kind for kind in options.faults or KINDS if kind not in left_out]
    plan = Plan(options.profile, options.seed, dict.fromkeys(kinds, options.times))
    with disk_errors(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        document = carry_out(
            plan,
            options.output / RESULT,
            f"sparseline drill --profile {plan.profile} --seed {plan.seed} --times {options.times}"
            + "".join(f" --fault {kind}" for kind in options.faults),
            lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True),
        )
        page = write_drill_page(options.output / PAGE, document, left_out)
    told = f"{document['cases']} faults, {document['wrong']} wrong; {page}, {options.output / RESULT}"
    console.print(told, markup=False, highlight=False, soft_wrap=True)
    return errors.EXIT_REJECTED if document["wrong"] else 0


def write_drill_page(path: Path, document: Mapping[str, Any], left_out: Mapping[str, str]) -> Path:
    """The drill as one self-contained page. Returns its path."""
    kinds = document["kinds"]
    recovered = [row["seconds_to_the_first_new_step"] for row in document["rows"]]
    known = sorted(seconds for seconds in recovered if seconds is not None)
    parts = [
        tiles(
            [
                (str(document["cases"]), "faults"),
                (str(document["wrong"]), "came out wrong"),
                (
                    f"{known[len(known) // 2]:.0f} s" if known else "none",
                    "median, until the first new training step",
                ),
                (f"{document['undisturbed_seconds']:.0f} s", "the undisturbed run"),
            ]
        )
    ]
    bars = [(kind, value) for kind, found in kinds.items() if (value := found["median_seconds_to_the_first_new_step"])]
    if bars:
        figure = bar_figure("Recovery", {"median": bars}, x="fault", y="seconds to the first new training step")
        parts.append(f'<div class="figures">{figure}</div>')
    parts += ["<h2>Faults</h2>", html_table(HEADER, [_cells(row) for row in document["rows"]], numbers=[1, 4, 5])]
    said = [[row["kind"], text] for row in document["rows"] for text in row["said"]]
    if said:
        parts += ["<h2>What the command said when it stopped</h2>", html_table(["fault", "message"], said)]
    if left_out:
        parts += ["<h2>Left out</h2>", html_table(["fault", "why"], [list(one) for one in left_out.items()])]
    lead = f"{document['profile']}, seed {document['seed']}, {document['date']}, {document['hardware']['cpu']}"
    return write_page(path, "Sparseline drill", parts, lead=lead)


def _cells(row: Mapping[str, Any]) -> list[str]:
    drawn = ("victim", "store_was", "jump_seconds", "free_bytes", "fault")
    told = ", ".join(f"{name.replace('_', ' ')} {row[name]}" for name in drawn if name in row)
    step = row["seconds_to_the_first_new_step"]
    return [
        row["kind"],
        f"{row['moment']:.1f} s",
        told,
        ", ".join(map(str, row["exit_codes"])),
        "" if step is None else f"{step:.1f} s",
        f"{row['seconds_to_the_end']:.1f} s",
        row["wrong"] or "as it has to be",
    ]
