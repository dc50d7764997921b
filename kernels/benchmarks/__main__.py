"""python -m kernels.benchmarks [--only attention,decode,...] [--output kernels/results]

Checks, measures the card's ceilings, runs the benchmark modules and writes <output>/<card>.json, .md and .svg.
Where the file is there and holds the same card and versions, the rows of modules that were not asked for stay as they
are; each module keeps the ceilings and the date of its own run.
"""

import argparse
import datetime
import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import torch

MODULES = ["attention", "decode", "forward", "indexer", "topk", "fused", "preparation"]


def table(result: dict) -> str:
    runs = result["runs"]
    lines = [
        f"# {result['device']}",
        "",
        f"torch {result['torch']}, triton {result['triton']}, CUDA {result['cuda']}; `{result['command']}`.",
        "Ceilings, measured in the process that measured the rows (TFLOP/s for bf16 and fp8, GB/s for copy):",
        "",
        *(f"- {name}, {run['date']}: {run['ceilings']}; after it {run['clocks_after']}" for name, run in runs.items()),
        "",
        "| operation | shape | selection | ms | against | ratio | bar | aim | holds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        sign = {"higher": "≥", "lower": "≤"}[r.get("better", "higher")] if r["bar"] is not None else ""
        holds = {True: "yes", False: "**no**", None: ""}[r["holds"]]
        cells = [r["operation"], r["shape"], r["selection"], r["ms"], r["against"], r["ratio"]]
        cells += [f"{sign} {r['bar']}" if sign else "", r["aim"] if r["aim"] is not None else "", holds]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    if result["failed"]:
        lines += ["", "Did not run: " + "; ".join(f"{name}: {why}" for name, why in result["failed"].items())]
    return "\n".join(lines) + "\n"


def write(result: dict, stem: Path) -> None:
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(result))


def plot(result: dict, path: Path) -> None:
    """Time per query of sparse attention by context length."""
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError:
        print("matplotlib is not installed: no plot")
        return
    figure, axes = pyplot.subplots(figsize=(6, 3.5))
    for heads in (128, 64, 16):
        wanted = f"sparse attention H={heads}"
        key = (wanted, "uniform", "bf16 ceiling")
        points = []
        for r in result["rows"]:
            length = re.search(r"S=(\d+)K", r["shape"])
            if (r["operation"], r["selection"], r["against"]) == key and length:
                points.append((int(length[1]), r["ms"] / 4.096))
        if points:
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=f"H={heads}")
    axes.set(xscale="log", xlabel="keys (K)", ylabel="µs per query", ylim=(0, None), title=result["device"])
    axes.set_xticks([4, 8, 16, 32, 64, 128], labels=["4", "8", "16", "32", "64", "128"])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MODULES), help="modules to run, separated by commas")
    parser.add_argument("--output", default="kernels/results", type=Path)
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(MODULES):
        parser.error(f"--only: {', '.join(sorted(unknown))} were given, accepted: {', '.join(MODULES)}")
    if not torch.cuda.is_available():
        parser.error("no NVIDIA GPU is here: the benchmarks time kernels on one")

    import triton

    from kernels.benchmarks.measure import Context, clocks, measure_ceilings

    torch.manual_seed(0)
    device = torch.device("cuda")
    context = Context(device, measure_ceilings(device))
    print("ceilings", context.ceilings, flush=True)
    versions = dict(
        device=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    stem = arguments.output / re.sub(r"\W+", "-", versions["device"]).strip("-").lower()
    result: dict = versions | dict(command="python -m kernels.benchmarks", runs={}, failed={}, rows=[])
    if stem.with_suffix(".json").exists():
        before = json.loads(stem.with_suffix(".json").read_text())
        if all(before.get(key) == value for key, value in versions.items()):
            result |= {key: before[key] for key in ("runs", "failed", "rows")}
    for name in names:
        result["rows"] = [r for r in result["rows"] if r["module"] != name]
        result["failed"].pop(name, None)
        if importlib.util.find_spec(f"kernels.benchmarks.{name}") is None:
            result["failed"][name] = "no such module"
            continue
        # one module that fails must not cost the measurements of the others: the failure is in the table and the exit
        # code
        try:
            found = importlib.import_module(f"kernels.benchmarks.{name}").rows(context)
        except Exception as error:
            result["failed"][name] = f"{type(error).__name__}: {str(error)[:300]}"
            continue
        finally:
            torch.cuda.empty_cache()
        result["rows"] += [{"module": name} | r for r in found]
        today = datetime.date.today().isoformat()
        result["runs"][name] = dict(date=today, ceilings=context.ceilings, clocks_after=clocks())
        for r in found:
            print(
                *(r[k] for k in ("operation", "shape", "selection", "ms", "against", "ratio", "bar", "holds")),
                sep=" | ",
                flush=True,
            )
        write(result, stem)  # what is measured so far, should the time end
    write(result, stem)
    plot(result, stem.with_suffix(".svg"))
    print("failed:", result["failed"], "written:", stem)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
