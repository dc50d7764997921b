"""Kills, stops and starves real runs at random moments, and compares them with a run that nobody disturbed.

    python -m tests.e2e.kills --kills 60 --seed 0 --output tests/results/kills.json

The kinds of faults are described in `pipelines/faults/kinds.py`, the verdicts in `pipelines/faults/judge.py`. Cases
that the output has already, made by the same sources, are kept; the command goes on with the rest. As root on Linux
everything can be done; elsewhere leave out what the command says is not possible.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from components.runtime.errors import EXIT_INPUT, EXIT_INTERRUPTED, InputError
from pipelines.faults.campaign import Plan, carry_out
from pipelines.faults.case import own_mounts
from pipelines.faults.kinds import KINDS

COUNTS = {"kill": 60, "s3-away": 5, "disk-full": 10, "clock": 5, "stop": 5}


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt  # so that the case at hand is ended and its folder removed


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, 1 when something is wrong with a case, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.kills", description=__doc__)
    for kind, count in COUNTS.items():
        parser.add_argument(f"--{'kills' if kind == 'kill' else kind}", dest=kind, type=int, default=count)
    parser.add_argument("--fault", choices=list(KINDS), help="this kind alone")
    parser.add_argument("--seed", type=int, default=0, help="of moments, victims and everything else that is drawn")
    parser.add_argument("--profile", default="micro")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time")
    parser.add_argument("--output", type=Path, required=True, help="result file (JSON)")
    options = parser.parse_args(arguments)
    counts = {kind: vars(options)[kind] for kind in COUNTS if options.fault in (None, kind)}
    own_mounts()
    signal.signal(signal.SIGTERM, _interrupt)
    words = ["python", "-m", "tests.e2e.kills", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        plan = Plan(options.profile, options.seed, counts)
        document = carry_out(
            plan, options.output, shlex.join(words), lambda text: print(text, flush=True), jobs=options.jobs
        )
    except InputError as error:
        print(f"kills: {error}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("kills: stopped; the same command goes on after the cases that are done", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 1 if document["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
