"""From episode records to rates, intervals and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.evaluation.play import Item
from components.evaluation.report import FamilyRates, Rate, Sides
from components.evaluation.statistics import cluster_bootstrap, paired_bootstrap
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

    def family_differences(self, before: Sequence[Item], after: Sequence[Item]) -> dict[str, Interval]:
        return {
            family: self.difference(of_family(before, family), of_family(after, family))
            for family in sorted({item.family for item in before})
        }

    def families(self, before: Sequence[Item], after: Sequence[Item]) -> dict[str, FamilyRates]:
        return {
            family: FamilyRates(
                before=self.mean(of_family(before, family)),
                after=self.mean(of_family(after, family)),
                difference=difference,
            )
            for family, difference in self.family_differences(before, after).items()
        }


def of_family(items: Sequence[Item], family: str) -> list[Item]:
    return [item for item in items if item.family == family]
