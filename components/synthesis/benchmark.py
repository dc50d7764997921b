"""How fast environments answer, and how long a validated task set takes.

    python -m components.synthesis.benchmark --output components/synthesis/results/speed.json

An environment step is a reset, a call or a verdict. Tasks are made as the synthesis stage makes them: each is past the
whole validation battery, with two processes side by side.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from components.environments.protocol import environments
from components.runtime.contracts import TaskRecord, ToolCall
from components.runtime.errors import InputError, exit_code
from components.runtime.processes import die_with_parent
from components.runtime.result_file import frame
from components.runtime.stage import write_json
from components.synthesis.config import SynthesisConfig
from components.synthesis.family import CAREFUL, Family, load_family
from components.synthesis.parts import battery_of
from components.synthesis.tasks import make_tasks

CODE = ("internal_api",)  # families whose steps run programs in the sandbox
PROCESSES = 2
PLAYED_TASKS = 200  # tasks of a family behind its steps per second
STEPS_PER_SECOND = 2000  # bar, one core, families without code
TASKS_SECONDS, CODE_TASKS_SECONDS = 20 * 60, 30 * 60  # bars


def plays(family: Family, number: int) -> list[tuple[TaskRecord, list[ToolCall]]]:
    """Tasks of all kinds of templates, each with the calls of the careful teacher, or of a random player."""
    rng, templates = random.Random("benchmark"), family.templates()
    found = []
    for index in range(number):
        task = family.generate(templates[index * 7919 % len(templates)], index, "train")
        calls = [family.random_call(task, rng) for _ in range(4)]
        if index % 2 == 0:
            careful = family.play(task, CAREFUL, rng)
            calls = [call for message in careful.messages for call in message.tool_calls]
        found.append((task, calls))
    return found


def steps_per_second(family: Family, number: int = PLAYED_TASKS, rounds: int = 3) -> float:
    """Environment steps per second on one core: the median of `rounds`, each over the same plays."""
    played = plays(family, number)
    rates = []
    for _ in range(rounds):
        steps, started = 0, time.perf_counter()
        for task, calls in played:
            episode = family.reset(task)
            steps += 2
            for call in calls:
                steps += 1
                if episode.step(call).done:
                    break
            episode.verdict()
        rates.append(steps / (time.perf_counter() - started))
    return statistics.median(rates)


def _make(name: str, number: int, part: int) -> int:
    family, config = load_family(name), SynthesisConfig()
    battery = battery_of(family, family.templates(), config, part)
    return len(make_tasks(family, family.templates(), number, "train", part, battery))


def seconds_to_make(names: Sequence[str], number: int) -> float:
    """Seconds until `number` tasks, divided among the families, are made and validated by `PROCESSES` processes."""
    shares = [number * (index + 1) // len(names) - number * index // len(names) for index in range(len(names))]
    work = [
        (name, share * (part + 1) // PROCESSES - share * part // PROCESSES, part)
        for name, share in zip(names, shares, strict=True)
        for part in range(PROCESSES)
    ]
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn"), die_with_parent) as pool:
        list(pool.map(len, [""] * PROCESSES))  # the processes are there
        started = time.monotonic()
        made = sum(future.result() for future in [pool.submit(_make, *one) for one in work])
    assert made == number
    return time.monotonic() - started


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m components.synthesis.benchmark", description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000, help="tasks of the families without code")
    parser.add_argument("--code-tasks", type=int, default=500, help="tasks of the families whose steps run programs")
    parser.add_argument("--output", type=Path, required=True, help="result file (JSON)")
    options = parser.parse_args(arguments)
    try:
        families = {name: load_family(name) for name in sorted(environments())}
        rates = {name: round(steps_per_second(family)) for name, family in families.items()}
        print(f"steps per second: {rates}", flush=True)
        plain = [name for name in families if name not in CODE]
        code = [name for name in families if name in CODE]
        rows: list[dict[str, Any]] = [
            {"what": f"environment steps per second and core, {name}", "value": rate, "unit": "1/s"}
            | ({} if name in CODE else {"bar": STEPS_PER_SECOND, "holds": rate >= STEPS_PER_SECOND})
            for name, rate in rates.items()
        ]
        for names, number, what, bar in (
            (plain, options.tasks, "validated tasks without code", TASKS_SECONDS),
            (code, options.code_tasks, "validated tasks with sandboxed programs", CODE_TASKS_SECONDS),
        ):
            seconds = seconds_to_make(names, number)
            print(f"{number} {what}: {seconds:.0f} s", flush=True)
            rows.append(
                {"what": f"{number} {what}, {PROCESSES} processes", "value": round(seconds, 1), "unit": "s"}
                | {"bar": bar, "holds": seconds <= bar}
            )
    except InputError as error:
        print(error, file=sys.stderr)
        return exit_code(error)
    command = (
        f"python -m components.synthesis.benchmark --tasks {options.tasks} --code-tasks {options.code_tasks} "
        f"--output {options.output}"
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, {**frame(command, ("sparseline", "numpy", "pydantic")), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
