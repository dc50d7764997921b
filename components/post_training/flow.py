"""The way of every prompt group: issued, played, then trained or dropped, each noted in the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from components.post_training.config import PostTrainingConfig
from components.post_training.curation import PromptGroup, PromptSampler
from components.post_training.ledger import Ledger
from components.post_training.trainer import advantages
from components.post_training.worker import PlayedGroup


@dataclass
class Batch:
    """groups: to be trained on, each `staleness` versions old. played: all that came back since the last batch."""

    groups: list[PlayedGroup]
    played: list[PlayedGroup]
    version: int
    staleness: list[int]


class Flow:
    """Issues groups and sorts what comes back. `useful` are the groups that wait to be trained on, oldest first."""

    def __init__(self, config: PostTrainingConfig, sampler: PromptSampler, ledger: Ledger) -> None:
        self.config, self.sampler, self.ledger = config, sampler, ledger
        self.useful: list[PlayedGroup] = []
        self.played: list[PlayedGroup] = []  # since the last batch, whatever became of them

    def issue(self, count: int, version: int) -> list[PromptGroup]:
        """New groups, while the learner's weights have this version."""
        groups = self.sampler.take(count)
        for group in groups:
            self.ledger.issued(group.id, group.task.id, group.task.environment, version)
        return groups

    def accept(self, played: Sequence[PlayedGroup]) -> None:
        """Take what was played: groups that teach nothing or are spoiled are dropped, the others wait."""
        for group in sorted(played, key=lambda group: group.id):
            self.ledger.finished(group.id, token_versions(group))
            self.played.append(group)
            if group.fault:
                self.ledger.dropped(group.id, f"faulty: {group.fault}")
            elif not any(advantages(group, self.config.length_penalty)):
                self.ledger.dropped(group.id, "zero variance")
            else:
                self.useful.append(group)

    def drop_older(self, oldest: int) -> None:
        """Drop the waiting groups with a token from weights before the version `oldest`."""
        for group in self.useful:
            if token_versions(group)[0] < oldest:
                self.ledger.dropped(group.id, "too old")
        self.useful = [group for group in self.useful if token_versions(group)[0] >= oldest]

    def batch(self, version: int) -> Batch:
        """Take a batch to train weights of this version on: at most `prompts` groups, and all that was played."""
        groups, self.useful = self.useful[: self.config.prompts], self.useful[self.config.prompts :]
        played, self.played = self.played, []
        return Batch(groups, played, version, [version - token_versions(group)[0] for group in groups])

    def trained(self, batch: Batch, step: int) -> None:
        """Note that the learner took its steps on the batch."""
        for group, age in zip(batch.groups, batch.staleness, strict=True):
            self.ledger.trained(group.id, step, batch.version, age)


def token_versions(group: PlayedGroup) -> tuple[int, int]:
    """Lowest and highest version of the weights that sampled the group's tokens."""
    found = [episode.trajectory for episode in group.episodes if episode.trajectory is not None]
    versions = [int(version) for t in found for version in t.weight_versions[t.sampled].unique()]
    return min(versions, default=group.version), max(versions, default=group.version)
