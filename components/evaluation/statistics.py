"""Estimators of the evaluation: pass@k, Wilson intervals, cluster bootstraps, power, Holm. Pure numpy, seeded, no I/O.

Legend: N items, F families (strata), C clusters (templates), R resamples.

Items of one template succeed and fail together, so the template and not the item is the unit that is resampled; and
two models play the same items with the same seeds, so their difference is taken item by item before anything is
averaged. Families are strata: clusters are resampled within each family, and the estimate is the mean over families of
the mean over the family's items ("macro"), so that a large family does not outvote a small one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np

from components.runtime.contracts import Interval


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples passes, from c passes in n samples.

    Chen et al. 2021 (arXiv 2107.03374), equation 1: 1 - C(n-c, k) / C(n, k), as a product that does not overflow.
    NaN when n < k: the estimator does not exist there.
    Raises ValueError when the counts are impossible.
    """
    if k < 1 or n < 0 or not 0 <= c <= n:
        raise ValueError(f"pass@k needs k >= 1 and 0 <= c <= n; got n={n}, c={c}, k={k}")
    if n < k:
        return math.nan
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of one rate (Wilson 1927): independent trials, good at rates near 0 and 1.

    Raises ValueError when n < 1 or the counts are impossible.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a rate needs n >= 1 and 0 <= successes <= n; got {successes} of {n}")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return Interval(mean=rate, low=max(0.0, centre - half), high=min(1.0, centre + half), n=n)


def macro_mean(values: Sequence[float], families: Sequence[str]) -> float:
    """Mean over families of the mean over each family's items."""
    values_N, families_N = np.asarray(values, dtype=np.float64), np.asarray(families)
    return float(np.mean([values_N[families_N == family].mean() for family in np.unique(families_N)]))


def cluster_bootstrap(
    values: Sequence[float],
    clusters: Sequence[str],
    families: Sequence[str] | None = None,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the macro mean of `values`, clusters resampled with replacement within their family.

    values: N numbers; clusters: N cluster names; families: N family names (None: one family).
    Field et al. 2007 (cluster bootstrap); Miller 2024 (arXiv 2411.00640) for why items must not be resampled singly.
    Raises ValueError when a value is not finite, lengths differ, or a family has fewer than 2 clusters (an interval
    from one cluster would have width zero and mean nothing).
    """
    values_N = np.asarray(values, dtype=np.float64)
    if values_N.ndim != 1 or len(values_N) == 0:
        raise ValueError("a bootstrap needs at least one value")
    family_names = ["all"] * len(values_N) if families is None else list(families)
    if not len(values_N) == len(clusters) == len(family_names):
        raise ValueError(f"{len(values_N)} values, {len(clusters)} clusters and {len(family_names)} families")
    if not np.isfinite(values_N).all():
        bad = int(np.flatnonzero(~np.isfinite(values_N))[0])
        raise ValueError(f"value {bad} of the bootstrap is {values_N[bad]}")

    rng = np.random.default_rng(seed)
    families_N, clusters_N = np.asarray(family_names), np.asarray(clusters)
    names_F = np.unique(families_N)
    estimates_R = np.zeros(resamples)
    for name in names_F:
        inside_N = families_N == name
        cluster_names_C, index_N = np.unique(clusters_N[inside_N], return_inverse=True)
        C = len(cluster_names_C)
        if C < 2:
            raise ValueError(f"family {name!r} has {C} cluster ({cluster_names_C[0]}); an interval needs at least 2")
        sums_C = np.bincount(index_N, weights=values_N[inside_N], minlength=C)
        sizes_C = np.bincount(index_N, minlength=C).astype(np.float64)
        counts_RC = rng.multinomial(C, np.full(C, 1.0 / C), size=resamples)
        estimates_R += (counts_RC @ sums_C) / (counts_RC @ sizes_C) / len(names_F)
    low, high = np.quantile(estimates_R, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(mean=macro_mean(values, family_names), low=float(low), high=float(high), n=len(values_N))


def paired_bootstrap(
    before: Sequence[float],
    after: Sequence[float],
    clusters: Sequence[str],
    families: Sequence[str] | None = None,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Interval of the macro mean of after - before, item by item (same tasks, same seeds). See `cluster_bootstrap`.

    Raises ValueError when the two have different lengths, and as `cluster_bootstrap` does.
    """
    if len(before) != len(after):
        raise ValueError(f"a paired comparison needs the same items on both sides; got {len(before)} and {len(after)}")
    difference_N = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return cluster_bootstrap(
        difference_N.tolist(), clusters, families, resamples=resamples, confidence=confidence, seed=seed
    )


def clustered_error(values: Sequence[float], clusters: Sequence[str], families: Sequence[str] | None = None) -> float:
    """Standard error of the macro mean of `values`, robust to clusters (Miller 2024, arXiv 2411.00640, section 2.2).

    The linearised ratio estimator with C / (C - 1); families are independent strata.
    Raises ValueError when a family has fewer than 2 clusters.
    """
    values_N, clusters_N = np.asarray(values, dtype=np.float64), np.asarray(clusters)
    families_N = np.asarray(["all"] * len(values_N) if families is None else families)
    names_F = np.unique(families_N)
    variance = 0.0
    for name in names_F:
        inside_N = families_N == name
        residuals_N = values_N[inside_N] - values_N[inside_N].mean()
        names_C, index_N = np.unique(clusters_N[inside_N], return_inverse=True)
        C = len(names_C)
        if C < 2:
            raise ValueError(f"family {name!r} has {C} cluster; a standard error needs at least 2")
        sums_C = np.bincount(index_N, weights=residuals_N)
        variance += C / (C - 1) * float(sums_C @ sums_C) / inside_N.sum() ** 2
    return math.sqrt(variance) / len(names_F)


def smallest_difference(
    differences: Sequence[float],
    clusters: Sequence[str],
    families: Sequence[str] | None = None,
    *,
    confidence: float = 0.95,
    power: float = 0.8,
) -> float:
    """The smallest true difference that a two-sided test at 1 - confidence finds with chance `power` on such a sample.

    differences: N paired differences. (z_confidence + z_power) times their clustered standard error; the spread is that
    of the sample, so a sample without any disagreement gives 0.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2) + NormalDist().inv_cdf(power)
    return z * clustered_error(differences, clusters, families)


def sign_flip_p_value(
    differences: Sequence[float], clusters: Sequence[str], *, resamples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value of `the mean paired difference is 0`: signs of whole clusters are flipped at random.

    Exact up to Monte Carlo error when a cluster's sum is symmetric about 0; never 0, as (1 + b) / (1 + R) (Phipson and
    Smyth 2010).
    """
    _, index_N = np.unique(np.asarray(clusters), return_inverse=True)
    sums_C = np.bincount(index_N, weights=np.asarray(differences, dtype=np.float64))
    signs_RC = np.random.default_rng(seed).integers(0, 2, size=(resamples, len(sums_C))) * 2.0 - 1.0
    # equal sums that were added in another order count as equal
    extreme = np.abs(signs_RC @ sums_C) >= abs(float(sums_C.sum())) - 1e-9
    return float((1 + extreme.sum()) / (1 + resamples))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's (1979) step-down adjusted p-values by name: they bound the chance of any false rejection."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return adjusted
