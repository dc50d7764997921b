"""Every number of the report that follows from the records of episodes alone, so that it can be computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypedDict

from components.evaluation.compare import Bootstrap
from components.evaluation.play import Item
from components.evaluation.report import (
    BestTemperature,
    Champion,
    ComputeCurves,
    CurvePoint,
    PassAt1,
    Sides,
)
from components.evaluation.statistics import pass_at_k
from components.runtime.contracts import Interval, Pointer
from components.runtime.errors import InputError

SAMPLED = 1.0  # the temperature of the main measure: the distribution that RL trained
BUDGETS = 16  # points of the curve over tokens


class Measures(TypedDict):
    """Fields of `EvaluationReport` that come from the episodes."""

    templates: int
    faults: list[str]
    pass_at_1: PassAt1
    pass_at_1_long: Sides | None
    greedy: Sides
    compute: ComputeCurves | None


def select(items: Sequence[Item], player: str, measure: str, temperature: float) -> list[Item]:
    """The episodes of one play, in the order of their positions."""
    key = (player, measure, temperature)
    return sorted((i for i in items if (i.player, i.measure, i.temperature) == key), key=lambda item: item.position)


def measure(items: Sequence[Item], bootstrap: Bootstrap, separate: Sequence[str]) -> Measures:
    """All of them. Raises InputError when every family is a separate one: then nothing is left for the macro mean."""
    before, after = (select(items, player, "sampled", SAMPLED) for player in ("before", "after"))
    main = [[item for item in side if item.family not in separate] for side in (before, after)]
    apart = [[item for item in side if item.family in separate] for side in (before, after)]
    if not main[0]:
        raise InputError(
            f"every family of the task set is reported separately ({', '.join(separate)}); leave one out of `separate`"
        )
    greedy, long = (
        [
            [item for item in select(items, player, name, temperature) if item.family not in separate]
            for player in ("before", "after")
        ]
        for name, temperature in (("greedy", 0.0), ("long", SAMPLED))
    )
    return Measures(
        templates=len({(item.family, item.template) for item in main[0]}),
        faults=[f"{item.player} {item.measure} {item.task[:16]}: {item.fault}" for item in items if item.fault],
        pass_at_1=PassAt1(
            **dict(bootstrap.sides(*main)),
            smallest_difference=bootstrap.smallest_difference(*main),
            families=bootstrap.families(before, after),
            unseen_environments=bootstrap.unseen(*apart),
            before_best_temperature=_at_best_temperature(items, main[1], bootstrap, separate),
        ),
        pass_at_1_long=bootstrap.sides(*long) if long[0] else None,
        greedy=bootstrap.sides(*greedy),
        compute=_curves(items, main, bootstrap, separate),
    )


def validation_rates(items: Sequence[Item], bootstrap: Bootstrap, separate: Sequence[str]) -> dict[float, Interval]:
    """pass@1 of the model before RL on validation tasks, by temperature."""
    played = [i for i in items if (i.player, i.measure) == ("before", "validation") and i.family not in separate]
    temperatures = dict.fromkeys(item.temperature for item in played)
    return {t: bootstrap.mean([item for item in played if item.temperature == t]) for t in temperatures}


def best_temperature(items: Sequence[Item], bootstrap: Bootstrap, separate: Sequence[str]) -> float:
    """The temperature at which the model before RL is best on validation tasks; of equals, the one named first."""
    rates = validation_rates(items, bootstrap, separate)
    return max(rates, key=lambda temperature: rates[temperature].mean)


def _at_best_temperature(
    items: Sequence[Item], after: Sequence[Item], bootstrap: Bootstrap, separate: Sequence[str]
) -> BestTemperature:
    best = best_temperature(items, bootstrap, separate)
    played = [item for item in select(items, "before", "sampled", best) if item.family not in separate]
    rates = validation_rates(items, bootstrap, separate)
    return BestTemperature(
        temperature=best,
        validation={f"{temperature:g}": rate for temperature, rate in rates.items()},
        test=bootstrap.rate(played),
        difference=bootstrap.difference(played, after),
    )


def champion_of(items: Sequence[Item], pointer: Pointer, bootstrap: Bootstrap, separate: Sequence[str]) -> Champion:
    """The candidate against the champion, from the episodes of both."""
    played, candidate = (select(items, player, "sampled", SAMPLED) for player in ("champion", "after"))
    main = [[item for item in side if item.family not in separate] for side in (played, candidate)]
    return Champion(
        pointer=pointer,
        rate=bootstrap.rate(main[0]),
        difference=bootstrap.difference(*main),
        smallest_difference=bootstrap.smallest_difference(*main),
        families=bootstrap.family_differences(played, candidate),
    )


def _curves(
    items: Sequence[Item], main: Sequence[Sequence[Item]], bootstrap: Bootstrap, separate: Sequence[str]
) -> ComputeCurves | None:
    sampled = {
        player: [item for item in select(items, player, "samples", SAMPLED) if item.family not in separate]
        for player in ("before", "after")
    }
    if not sampled["before"]:
        return None
    lengths = [item.tokens for side in main for item in side]
    lowest, highest = min(lengths), max(lengths)
    budgets = sorted({lowest + (highest - lowest) * step // (BUDGETS - 1) for step in range(BUDGETS)})
    budget = {
        player: [CurvePoint(x=b, rate=bootstrap.mean([_within(item, b) for item in side])) for b in budgets]
        for player, side in zip(("before", "after"), main, strict=True)
    }
    samples = max(item.sample for item in sampled["before"]) + 1
    ks = [1 << power for power in range(samples.bit_length()) if 1 << power <= samples]
    return ComputeCurves(
        budget=budget,
        pass_at_k={
            player: [CurvePoint(x=k, rate=_pass_at_k(side, k, bootstrap)) for k in ks]
            for player, side in sampled.items()
        },
        tasks=len({item.task for item in sampled["before"]}),
        samples=samples,
    )


def _within(item: Item, budget: int) -> Item:
    return item if item.tokens <= budget else replace(item, reward=0.0)


def _pass_at_k(items: Sequence[Item], k: int, bootstrap: Bootstrap) -> Interval:
    by_task: dict[str, list[Item]] = {}
    for item in items:
        by_task.setdefault(item.task, []).append(item)
    groups = list(by_task.values())
    return bootstrap.over(
        [pass_at_k(len(group), sum(item.reward == 1.0 for item in group), k) for group in groups],
        [group[0].template for group in groups],
        [group[0].family for group in groups],
    )
