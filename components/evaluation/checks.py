"""The checks of an evidence bundle: whether an evaluation's report follows from its records, and they from the models.

Cross-entropies, the indexer's recall and the log-probability gap are no function of the records and are not checked.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components.evaluation.compare import Bootstrap
from components.evaluation.gate import GateConfig, decide
from components.evaluation.measures import champion_of, measure
from components.evaluation.play import Item, Player, episode_seed, tokenizer_sha256
from components.evaluation.replay import describe, generate_again, judge_again
from components.evaluation.report import EvaluationReport
from components.runtime.contracts import GateVerdict, TaskRecord

FROM_ITEMS = ("templates", "faults", "pass_at_1", "pass_at_1_long", "greedy", "compute", "champion")


@dataclass(frozen=True)
class Check:
    """One line of the verification: what was checked, whether it holds, the numbers or what is wrong."""

    name: str
    holds: bool
    detail: str


@dataclass(frozen=True)
class Bundle:
    """An evaluation with all that it was made from. `players`: before, after, and champion where it was compared."""

    report: EvaluationReport
    items: Sequence[Item]
    verdict: GateVerdict
    gate: GateConfig
    tasks: Mapping[str, TaskRecord]
    players: Mapping[str, Player]


def check(bundle: Bundle, *, sample: int, seed: int) -> Iterator[Check]:
    """All checks in turn, the quick ones first. `sample` episodes are generated anew, drawn with `seed`."""
    yield _records(bundle)
    unknown = [item.task for item in bundle.items if item.task not in bundle.tasks]
    if unknown:
        yield Check("tasks of the records", False, f"task {unknown[0][:12]} is not in the task set")
        return
    yield _seeds(bundle)
    again, statistics = _statistics(bundle)
    yield statistics
    yield _gate(bundle, again)
    yield _verdicts(bundle)
    yield _generated(bundle, sample, seed)


def _told(name: str, wrong: Sequence[str], good: str) -> Check:
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return Check(name, not wrong, wrong[0] + more if wrong else good)


def _records(bundle: Bundle) -> Check:
    """Whether every record names the weights, tokenizer and task set of the report."""
    digests = {name: (player.weights, tokenizer_sha256(player.tokenizer)) for name, player in bundle.players.items()}
    wrong = []
    for item in bundle.items:
        if item.player not in digests:
            wrong.append(f"{describe(item)}: the report knows no such player")
        elif (item.weights, item.tokenizer_sha256) != digests[item.player]:
            wrong.append(f"{describe(item)}: played with other weights or another tokenizer")
        elif item.task_set != bundle.report.tasks.sha256:
            wrong.append(f"{describe(item)}: from another task set")
    return _told("digests in the records", wrong, f"{len(bundle.items)} episodes of {len(digests)} models")


def _seeds(bundle: Bundle) -> Check:
    wrong = [
        f"{describe(item)}: seed {item.seed} is not that of the task"
        for item in bundle.items
        if item.seed != episode_seed(bundle.report.seed, bundle.tasks[item.task], item.sample)
    ]
    return _told("seeds of the episodes", wrong, f"from the run's seed {bundle.report.seed} and the task")


def _statistics(bundle: Bundle) -> tuple[EvaluationReport, Check]:
    """The report with every number that follows from the records computed again, and whether it is the same."""
    report = bundle.report
    bootstrap = Bootstrap(report.resamples, report.confidence, report.seed)
    fields: dict[str, Any] = dict(measure(bundle.items, bootstrap, report.separate))
    if report.champion is not None:
        fields["champion"] = champion_of(bundle.items, report.champion.pointer, bootstrap, report.separate)
    again = report.model_copy(update=fields)
    recorded, computed = ({n: one.model_dump()[n] for n in FROM_ITEMS} for one in (report, again))
    wrong = [f"{path} is {a} in the report, {b} from the records" for path, a, b in unlike(recorded, computed)]
    return again, _told("statistics", wrong, f"{numbers(computed)} numbers computed again from the records")


def _gate(bundle: Bundle, again: EvaluationReport) -> Check:
    verdict = bundle.verdict
    champion = None if verdict.baseline.sha256 == again.before.sha256 else verdict.baseline
    try:
        found = decide(again, champion, bundle.gate)
    except ValueError as error:
        return Check("verdict of the gate", False, str(error))
    wrong = [f"{path} is {a}, the gate finds {b}" for path, a, b in unlike(verdict.model_dump(), found.model_dump())]
    holding = sum(rule.holds for rule in found.rules)
    return _told("verdict of the gate", wrong, f"{found.verdict}: {holding} of {len(found.rules)} rules hold")


def _verdicts(bundle: Bundle) -> Check:
    wrong: list[str] = []
    for name, player in bundle.players.items():
        wrong += judge_again([i for i in bundle.items if i.player == name], bundle.tasks, player.tokenizer)
    faulty = sum(bool(item.fault) for item in bundle.items)
    good = f"{len(bundle.items) - faulty} episodes judged again from their tokens"
    return _told("verdicts of the episodes", wrong, good + (f"; {faulty} faulty ones left out" if faulty else ""))


def _generated(bundle: Bundle, sample: int, seed: int) -> Check:
    sound = [item for item in bundle.items if not item.fault]
    chosen = random.Random(seed).sample(sound, min(sample, len(sound)))
    wrong, needed = generate_again(
        chosen,
        bundle.items,
        bundle.players,
        bundle.tasks,
        seed=bundle.report.seed,
        max_sequences=bundle.report.max_sequences,
    )
    good = f"{len(chosen)} episodes generated again, tokens equal (drawn with seed {seed})"
    return _told("tokens of a sample", wrong, good + (f"; {needed} needed the recorded batch" if needed else ""))


def unlike(one: Any, other: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two nested values differ: (path, value, other value). Floats are equal within 1e-9."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = dict.fromkeys([*one, *other])
        return [
            found
            for key in keys
            for found in unlike(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [f for n, pair in enumerate(zip(one, other, strict=True)) for f in unlike(*pair, f"{path}[{n}]")]
    if isinstance(one, float) and isinstance(other, (int, float)):
        return [] if math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9) else [(path, one, other)]
    return [] if one == other else [(path, one, other)]


def numbers(value: Any) -> int:
    """How many numbers a nested value holds."""
    if isinstance(value, dict):
        return sum(map(numbers, value.values()))
    if isinstance(value, list):
        return sum(map(numbers, value))
    return int(isinstance(value, (int, float)) and not isinstance(value, bool))
