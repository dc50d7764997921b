"""The estimators against enumeration, scipy and simulated coverage."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from scipy import stats

from components.evaluation.statistics import (
    cluster_bootstrap,
    macro_mean,
    paired_bootstrap,
    pass_at_k,
    wilson_interval,
)


@pytest.mark.parametrize("n, c, k", [(5, 0, 2), (5, 2, 1), (5, 2, 3), (6, 3, 4), (7, 7, 7), (7, 1, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_pass(n: int, c: int, k: int) -> None:
    samples = [1] * c + [0] * (n - c)
    subsets = list(itertools.combinations(samples, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(s) for s in subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_unbiased_under_the_binomial() -> None:
    n, k, p = 9, 4, 0.3
    expectation = sum(stats.binom.pmf(c, n, p) * pass_at_k(n, c, k) for c in range(n + 1))
    assert expectation == pytest.approx(1 - (1 - p) ** k, abs=1e-12)


def test_pass_at_k_does_not_overflow_and_refuses_nonsense() -> None:
    assert 0.09 < pass_at_k(100_000, 10_000, 1) < 0.11
    assert math.isnan(pass_at_k(3, 1, 4))
    for n, c, k in [(3, 4, 1), (3, -1, 1), (3, 1, 0)]:
        with pytest.raises(ValueError, match="pass@k"):
            pass_at_k(n, c, k)


@pytest.mark.parametrize("successes, n", [(0, 12), (1, 7), (250, 500), (499, 500), (500, 500)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_equals_scipy(successes: int, n: int, confidence: float) -> None:
    expected = stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    found = wilson_interval(successes, n, confidence)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert (found.mean, found.n) == (successes / n, n)


def test_wilson_refuses_an_empty_sample() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        wilson_interval(0, 0)


def test_bootstrap_of_two_clusters_is_known_exactly() -> None:
    # clusters a (mean 0) and b (mean 1) of equal size: resamples give 0, 1/2, 1 with chances 1/4, 1/2, 1/4
    interval = cluster_bootstrap([0, 0, 1, 1], ["a", "a", "b", "b"], confidence=0.4)
    assert (interval.mean, interval.low, interval.high, interval.n) == (0.5, 0.5, 0.5, 4)
    interval = cluster_bootstrap([0, 0, 1, 1], ["a", "a", "b", "b"], confidence=0.6)
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_bootstrap_with_singleton_clusters_agrees_with_scipy() -> None:
    values = np.random.default_rng(3).normal(0.2, 1.0, size=80)
    found = cluster_bootstrap(values.tolist(), [str(i) for i in range(80)], resamples=20_000)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(4)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert found.mean == pytest.approx(values.mean(), abs=1e-12)


def test_clustered_items_give_a_wider_interval_than_single_items() -> None:
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=24), 20) + 0.1 * rng.normal(size=480)
    clusters = [str(i) for i in np.repeat(np.arange(24), 20)]
    clustered = cluster_bootstrap(values.tolist(), clusters)
    single = cluster_bootstrap(values.tolist(), [str(i) for i in range(480)])
    assert clustered.high - clustered.low > 3.5 * (single.high - single.low)  # sqrt(20) = 4.5 in the limit


def test_coverage_with_24_templates_of_unequal_size() -> None:
    rng = np.random.default_rng(11)
    sizes = rng.integers(10, 31, size=24)
    clusters = [str(i) for i in np.repeat(np.arange(24), sizes)]
    covered = 0
    for trial in range(400):
        before_rate = rng.beta(2, 6, size=24).repeat(sizes)
        after_rate = np.clip(before_rate + 0.2 + rng.normal(0, 0.1, size=24).repeat(sizes), 0, 1)
        before, after = rng.random(len(clusters)) < before_rate, rng.random(len(clusters)) < after_rate
        interval = paired_bootstrap(before.tolist(), after.tolist(), clusters, resamples=800, seed=trial)
        covered += interval.low <= 0.2 <= interval.high  # clipping moves the truth by less than 0.002
    # nominal 0.95; a percentile bootstrap of 24 clusters is known to be a few points short
    assert 0.89 <= covered / 400 <= 0.98


def test_pairing_removes_what_both_sides_share() -> None:
    rng = np.random.default_rng(1)
    hard = rng.random(500)
    clusters = [str(i % 25) for i in range(500)]
    interval = paired_bootstrap(hard.tolist(), (hard + 0.1).tolist(), clusters)
    assert (interval.low, interval.high) == pytest.approx((0.1, 0.1), abs=1e-12)


def test_macro_weighs_families_and_not_items() -> None:
    values, families = [1.0] * 90 + [0.0] * 10, ["big"] * 90 + ["small"] * 10
    clusters = [f"{family}{i % 3}" for i, family in enumerate(families)]
    assert macro_mean(values, families) == 0.5
    interval = cluster_bootstrap(values, clusters, families)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.5, 0.5, 0.5))


def test_bootstrap_is_seeded_and_fast() -> None:
    rng = np.random.default_rng(2)
    before, after = (rng.random(2000) < 0.3).tolist(), (rng.random(2000) < 0.5).tolist()
    clusters = [str(i % 100) for i in range(2000)]
    start = time.process_time()
    first = paired_bootstrap(before, after, clusters, seed=5)
    assert time.process_time() - start < 1.0
    assert paired_bootstrap(before, after, clusters, seed=5) == first
    assert paired_bootstrap(before, after, clusters, seed=6) != first


@pytest.mark.parametrize(
    "values, clusters, message",
    [
        ([], [], "at least one value"),
        ([1.0, math.nan], ["a", "b"], "value 1 of the bootstrap is nan"),
        ([1.0, 2.0], ["a", "a"], "needs at least 2"),
        ([1.0, 2.0], ["a"], "2 values, 1 clusters"),
    ],
)
def test_bootstrap_refuses_what_has_no_answer(values: list[float], clusters: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_bootstrap(values, clusters)


def test_paired_needs_pairs() -> None:
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap([1.0], [1.0, 0.0], ["a", "b"])
