"""From episode records to rates, intervals and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from components.evaluation.play import Item
from components.evaluation.report import FamilyRates, Rate, Sides, UnseenEnvironments
from components.evaluation.statistics import (
    cluster_bootstrap,
    holm,
    paired_bootstrap,
    sign_flip_p_value,
    smallest_difference,
    wilson_interval,
)
from components.runtime.contracts import Interval


@dataclass(frozen=True)
class Bootstrap:
    """Settings of every interval of a report."""

    resamples: int
    confidence: float
    seed: int

    def over(self, values: Sequence[float], clusters: Sequence[str], families: Sequence[str] | None = None) -> Interval:
        """Macro mean of values, clusters resampled."""
        return cluster_bootstrap(
            values, clusters, families, resamples=self.resamples, confidence=self.confidence, seed=self.seed
        )

    def mean(self, items: Sequence[Item]) -> Interval:
        """Macro mean of the rewards."""
        return self.over(
            [item.reward for item in items], [item.template for item in items], [item.family for item in items]
        )

    def rate(self, items: Sequence[Item]) -> Rate:
        found = self.mean(items)
        return Rate(macro=found.mean, low=found.low, high=found.high, n=found.n)

    def difference(self, before: Sequence[Item], after: Sequence[Item]) -> Interval:
        """Macro mean of after - before, pair by pair. Raises ValueError when the two did not play the same pairs."""
        pairs = list(zip(before, after, strict=True))
        unlike = [one for one, other in pairs if (one.task, one.seed) != (other.task, other.seed)]
        if unlike:
            raise ValueError(f"not a pair: task {unlike[0].task[:12]} was played with another task or seed")
        return paired_bootstrap(
            [item.reward for item in before],
            [item.reward for item in after],
            [item.template for item in before],
            [item.family for item in before],
            resamples=self.resamples,
            confidence=self.confidence,
            seed=self.seed,
        )

    def sides(self, before: Sequence[Item], after: Sequence[Item]) -> Sides:
        return Sides(before=self.rate(before), after=self.rate(after), difference=self.difference(before, after))

    def smallest_difference(self, before: Sequence[Item], after: Sequence[Item]) -> float:
        """The smallest macro difference that these pairs show with 80% power."""
        differences = [other.reward - one.reward for one, other in zip(before, after, strict=True)]
        return smallest_difference(
            differences,
            [item.template for item in before],
            [item.family for item in before],
            confidence=self.confidence,
        )

    def unseen(self, before: Sequence[Item], after: Sequence[Item]) -> UnseenEnvironments | None:
        """Families of wholly held-out environments; the environment is the cluster. None without such items."""
        if not before:
            return None
        one, other = ([replace(item, template=item.group) for item in side] for side in (before, after))
        return UnseenEnvironments(
            **dict(self.sides(one, other)), n=len(one), environments=len({(i.family, i.group) for i in one})
        )

    def wilson(self, items: Sequence[Item]) -> Interval:
        return wilson_interval(sum(item.reward == 1.0 for item in items), len(items), self.confidence)

    def family_differences(self, before: Sequence[Item], after: Sequence[Item]) -> dict[str, Interval]:
        return {
            family: self.difference(of_family(before, family), of_family(after, family))
            for family in sorted({item.family for item in before})
        }

    def families(self, before: Sequence[Item], after: Sequence[Item]) -> dict[str, FamilyRates]:
        sides = {f: (of_family(before, f), of_family(after, f)) for f in sorted({item.family for item in before})}
        p_values = {
            family: sign_flip_p_value(
                [b.reward - a.reward for a, b in zip(one, other, strict=True)],
                [item.template for item in one],
                resamples=self.resamples,
                seed=self.seed,
            )
            for family, (one, other) in sides.items()
        }
        adjusted = holm(p_values)
        return {
            family: FamilyRates(
                before=self.mean(one),
                after=self.mean(other),
                difference=self.difference(one, other),
                before_wilson=self.wilson(one),
                after_wilson=self.wilson(other),
                p_value=p_values[family],
                p_adjusted=adjusted[family],
            )
            for family, (one, other) in sides.items()
        }


def of_family(items: Sequence[Item], family: str) -> list[Item]:
    return [item for item in items if item.family == family]
