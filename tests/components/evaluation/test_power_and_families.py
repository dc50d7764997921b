"""Clustered errors, power, sign flips and Holm against closed forms, enumeration, scipy and simulation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from components.evaluation.compare import Bootstrap
from components.evaluation.measures import best_temperature, measure
from components.evaluation.play import Item
from components.evaluation.statistics import clustered_error, holm, sign_flip_p_value, smallest_difference
from components.runtime.errors import InputError


def test_clustered_error_of_single_items_is_the_ordinary_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert clustered_error(list(values), [str(i) for i in range(40)]) == pytest.approx(stats.sem(values))


def test_clustered_error_of_whole_clusters_is_that_of_the_cluster_means() -> None:
    means = np.random.default_rng(1).normal(size=12)
    values, clusters = np.repeat(means, 7), np.repeat(np.arange(12).astype(str), 7)
    assert clustered_error(list(values), list(clusters)) == pytest.approx(stats.sem(means))


def test_clustered_error_of_a_macro_mean_adds_the_variances_of_families() -> None:
    rng = np.random.default_rng(2)
    one, other = rng.normal(size=30), rng.normal(size=50)
    names = [str(i) for i in range(80)]
    found = clustered_error([*one, *other], names, ["a"] * 30 + ["b"] * 50)
    assert found == pytest.approx(math.hypot(stats.sem(one), stats.sem(other)) / 2)
    with pytest.raises(ValueError, match="1 cluster"):
        clustered_error([0, 1], ["a", "a"])


def test_the_smallest_difference_is_found_with_the_stated_power() -> None:
    rng = np.random.default_rng(3)
    clusters = [str(c) for c in range(60) for _ in range(5)]

    def sample(shift: float) -> np.ndarray:
        return shift + np.repeat(rng.normal(0, 0.3, 60), 5) + rng.normal(0, 0.5, 300)

    shift = float(np.mean([smallest_difference(list(sample(0)), clusters) for _ in range(50)]))
    found = 0
    for _ in range(1000):
        values = list(sample(shift))
        found += abs(np.mean(values)) > 1.96 * clustered_error(values, clusters)
    assert found / 1000 == pytest.approx(0.8, abs=0.04)


def test_sign_flips_equal_enumeration() -> None:
    differences, clusters = [1, 0, 1, 1, -1, 0, 1, 1], ["a", "a", "b", "b", "c", "d", "d", "e"]
    sums = np.array([1, 2, -1, 1, 1])
    every = [abs(np.dot(signs, sums)) >= abs(sums.sum()) for signs in itertools.product((-1, 1), repeat=5)]
    assert sign_flip_p_value(differences, clusters, resamples=40_000) == pytest.approx(np.mean(every), abs=0.01)
    assert sign_flip_p_value([0.0, 0.0], ["a", "b"]) == 1.0


def test_sign_flips_keep_their_level_where_items_of_a_cluster_agree() -> None:
    rng = np.random.default_rng(4)
    clusters = [str(c) for c in range(20) for _ in range(10)]
    wrong = 0
    for seed in range(400):
        values = np.repeat(rng.choice([-1, 0, 1], 20), 10)
        wrong += sign_flip_p_value(list(values), clusters, resamples=400, seed=seed) <= 0.05
    assert wrong / 400 <= 0.08  # an unclustered test would be wrong about half the time


def test_holm_is_the_worked_example_and_monotone() -> None:
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


BOOTSTRAP = Bootstrap(resamples=200, confidence=0.95, seed=0)


def episodes(
    player: str, family: str, rewards: list[float], kind: str = "sampled", temperature: float = 1.0
) -> list[Item]:
    made = Item(player, kind, temperature, "", family, "", 1, 0.0, "submitted", "", 2, 0, 40, "")
    return [
        replace(
            made, task=f"{family}{n}", template=f"t{n}", group=f"g{n // 2}", reward=r, position=n, tokens=10 * n + 10
        )
        for n, r in enumerate(rewards)
    ]


def played() -> list[Item]:
    found = []
    for kind, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        for family, before, after in (("a", [0, 0, 0, 0], [1, 1, 1, 0]), ("compiled", [0] * 6, [1, 1, 1, 1, 0, 0])):
            found += episodes("before", family, before, kind, temperature)
            found += episodes("after", family, after, kind, temperature)
    found += episodes("before", "b", [1, 1], "sampled") + episodes("after", "b", [1, 1], "sampled")
    found += episodes("before", "b", [1, 1], "greedy", 0.0) + episodes("after", "b", [1, 1], "greedy", 0.0)
    found += episodes("before", "a", [0, 1], "validation", 0.5) + episodes("before", "a", [0, 0], "validation", 1.0)
    found += episodes("before", "a", [1, 0, 0, 0], "sampled", 0.5) + episodes("before", "b", [1, 1], "sampled", 0.5)
    for player, rewards in (("before", [0, 0, 1, 0]), ("after", [1, 1, 1, 0])):
        found += [
            replace(item, task=f"a{n // 2}", template=f"t{n // 2}", sample=n % 2)
            for n, item in enumerate(episodes(player, "a", rewards, "samples"))
        ]
    return found


def test_the_macro_is_the_mean_of_families_and_unseen_environments_stand_apart() -> None:
    found = measure(played(), BOOTSTRAP, ["compiled"])
    rates = found["pass_at_1"]
    assert rates.after.macro == pytest.approx((0.75 + 1.0) / 2)
    assert rates.difference.mean == pytest.approx(0.375)
    assert set(rates.families) == {"a", "b", "compiled"}
    assert rates.families["a"].after_wilson.low == pytest.approx(
        stats.binomtest(3, 4).proportion_ci(0.95, method="wilson").low
    )
    assert all(family.p_adjusted >= family.p_value for family in rates.families.values())
    unseen = rates.unseen_environments
    assert unseen is not None
    assert (unseen.before.macro, unseen.n, unseen.environments) == (0.0, 6, 3)
    assert unseen.difference.mean == pytest.approx(4 / 6)
    assert found["templates"] == 6


def test_the_model_before_is_compared_at_its_best_validation_temperature() -> None:
    items = played()
    assert best_temperature(items, BOOTSTRAP, ["compiled"]) == 0.5
    best = measure(items, BOOTSTRAP, ["compiled"])["pass_at_1"].before_best_temperature
    assert best.test.macro == pytest.approx((0.25 + 1) / 2)
    assert best.difference.mean == pytest.approx((0.5 + 0) / 2)


def test_curves_count_what_fits_the_budget_and_pass_at_k_of_the_samples() -> None:
    curves = measure(played(), BOOTSTRAP, ["compiled"])["compute"]
    assert curves is not None
    budget = {point.x: point.rate.mean for point in curves.budget["after"]}
    assert (min(budget), max(budget)) == (10, 40)
    assert budget[10] == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert budget[40] == pytest.approx((3 / 4 + 1) / 2)
    assert [(p.x, p.rate.mean) for p in curves.pass_at_k["after"]] == [(1, pytest.approx(0.75)), (2, 1.0)]
    assert [(p.x, p.rate.mean) for p in curves.pass_at_k["before"]] == [(1, pytest.approx(0.25)), (2, 0.5)]


def test_a_task_set_of_separate_families_only_is_refused() -> None:
    with pytest.raises(InputError, match="separately"):
        measure([i for i in played() if i.family == "compiled"], BOOTSTRAP, ["compiled"])


def test_faulty_episodes_are_listed() -> None:
    items = played()
    items[0] = replace(items[0], fault="the environment raised")
    assert measure(items, BOOTSTRAP, ["compiled"])["faults"] == ["before sampled a0: the environment raised"]
