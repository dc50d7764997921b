"""The learner's state and one update: the network, its reference, the optimiser, and the version of the weights."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from components.post_training.config import PostTrainingConfig
from components.post_training.learner import RolloutBatch, logprobs, micro_batches, pack_trajectories
from components.post_training.objective import Objective, group_advantages, grpo_loss, length_penalised, rft_loss
from components.post_training.worker import PlayedGroup
from components.runtime.ranks import Ranks
from model import Transformer
from model.engine import Trajectory


@dataclass
class Sample:
    """A trajectory to learn from. `proximal`: the learner's log-probabilities before the batch's first update, [R]."""

    trajectory: Trajectory
    advantage: float
    passed: bool
    kl_weight: float
    proximal: torch.Tensor | None = None


def advantages(group: PlayedGroup, length_penalty: float) -> list[float]:
    """The group's advantages. All zero where it teaches nothing."""
    reward_N = torch.tensor([float(episode.verdict.reward) for episode in group.episodes])
    if length_penalty:
        trajectories = [episode.trajectory for episode in group.episodes]
        tokens_N = torch.tensor([float(t.sampled.sum()) if t is not None else 0.0 for t in trajectories])
        budget_N = torch.full_like(tokens_N, group.task.limits.tokens)
        reward_N = length_penalised(reward_N, tokens_N, budget_N, length_penalty)
    return group_advantages(reward_N, torch.zeros(len(reward_N), dtype=torch.int64)).tolist()


class Learner:
    """`model` is changed in place, alike on all ranks; `version` counts the rollout batches that changed it."""

    def __init__(self, config: PostTrainingConfig, model: Transformer, ranks: Ranks | None = None) -> None:
        self.config, self.model, self.version, self.ranks = config, model, 0, ranks or Ranks()
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        model.requires_grad_(True)
        if config.freeze_indexer:
            for parameter in model.indexer_parameters():
                parameter.requires_grad_(False)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rate = config.learning_rate
        self.optimizer = torch.optim.AdamW(self.trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def state(self) -> dict[str, Any]:
        """What a later try needs: weights, optimiser, version. The reference is the checkpoint that RL starts from."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "version": self.version}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken, on all ranks."""
        self.ranks.deal([("load", state)] * self.ranks.size)
        self.take_state(state)

    def take_state(self, state: dict[str, Any]) -> None:
        """This rank's part of `load_state`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.version = state["version"]

    def set_learning_rate(self, step: int) -> None:
        """Linear from the peak down to `final_share` of it at the last step."""
        config = self.config
        share = 1 - (1 - config.final_share) * step / max(1, config.steps - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * share

    def train(self, groups: Sequence[PlayedGroup], rng: random.Random) -> dict[str, float]:
        """Learn from whole groups in `mini_batches` optimiser steps. Returns means over them; none without groups.

        Raises FloatingPointError for a gradient that is not finite; the weights are those before it.
        """
        parts = self.samples(groups, rng)
        if self.config.importance_cap is not None:
            for samples in parts:
                self.record_proximal(samples)
        updates = [self.update(samples) for samples in parts]
        if not updates:
            return {}
        self.version += 1
        values = {key: sum(update[key] for update in updates) / len(updates) for key in updates[0]}
        values["ratio_max"] = max(update["ratio_max"] for update in updates)
        # only before the first update can engine and learner hold the same weights
        return {**values, "logprob_gap": updates[0]["logprob_gap"], "ratio_bias": updates[0]["ratio_mean"] - 1}

    def samples(self, groups: Sequence[PlayedGroup], rng: random.Random) -> list[list[Sample]]:
        """The trajectories of each mini-batch. Groups stay whole, so that its advantages sum to zero."""
        config = self.config
        order = list(groups)
        rng.shuffle(order)
        parts = []
        for part in range(config.mini_batches):
            samples = []
            for group in order[part :: config.mini_batches]:
                weight = config.kl_weight_of(group.task.environment)
                for episode, advantage in zip(group.episodes, advantages(group, config.length_penalty), strict=True):
                    if episode.trajectory is None or (advantage == 0 and config.objective == "grpo"):
                        continue
                    if config.objective == "grpo" or episode.verdict.passed:
                        samples.append(Sample(episode.trajectory, advantage, episode.verdict.passed, weight))
            if samples:
                parts.append(samples)
        return parts

    def update(self, samples: Sequence[Sample]) -> dict[str, float]:
        """One optimiser step; every rank sees its share.

        Raises FloatingPointError for a gradient that is not finite.
        """
        rate = float(self.optimizer.param_groups[0]["lr"])
        orders = [("update", share, len(samples), rate) for share in self.ranks.shares(samples)]
        _, share, total, rate = self.ranks.deal(orders)
        return self.take_step(share, total, rate)

    def take_step(self, samples: Sequence[Sample], total: int, rate: float) -> dict[str, float]:
        """This rank's part of `update`: `samples` are its share of `total`, `rate` is the learning rate."""
        self.model.train()
        values, maxima = self.accumulate(samples, total)
        for parameter in self.trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sums = torch.tensor(list(values.values()), dtype=torch.float32)
        self.ranks.sum([*(parameter.grad for parameter in self.trained if parameter.grad is not None), sums])
        values = dict(zip(values, sums.tolist(), strict=True))
        for name in maxima:
            values[name] = max((found[name] for found in self.ranks.to_first(maxima)), default=maxima[name])
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.config.gradient_clip))
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(f"the gradient's norm is {norm}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {**values, "gradient_norm": norm}

    def accumulate(
        self, samples: Sequence[Sample], total: int | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Add the gradient of the loss over `samples` to the parameters'.

        Returns their part of the means over the mini-batch, and maxima over their own. `total`: sequences of the
        mini-batch, where `samples` are not all of them.
        """
        config, total = self.config, total or len(samples)
        means = dict.fromkeys(("kl", "entropy", "masked_share", "clipped_share", "ratio_mean"), 0.0)
        maxima = {"logprob_gap": 0.0, "ratio_max": 0.0}
        lengths = [len(sample.trajectory) for sample in samples]
        for indices in micro_batches(lengths, config.micro_batch_tokens) if samples else ():
            part = [samples[index] for index in indices]
            batch = self._pack(part)
            with torch.no_grad():
                reference_R, _ = logprobs(self.reference, batch, keep_routing=False, keep_selection=False)
            logprob_R, entropy_R = logprobs(self.model, batch, keep_routing=config.keep_routing)
            objective = self._objective(part, batch, logprob_R, reference_R, total)
            objective.loss.backward()
            weight = len(part) / total
            for name in ("kl", "masked_share", "clipped_share", "ratio_mean"):
                means[name] += getattr(objective, name) * weight
            means["entropy"] += float(entropy_R.mean()) * weight
            gap = float((logprob_R.detach() - batch.old_logprob_R).abs().max())
            maxima["logprob_gap"] = max(maxima["logprob_gap"], gap)
            maxima["ratio_max"] = max(maxima["ratio_max"], objective.ratio_max)
        return means, maxima

    def record_proximal(self, samples: Sequence[Sample]) -> None:
        """Note the log-probabilities that the weights of now give to the samples' tokens."""
        for indices in micro_batches([len(sample.trajectory) for sample in samples], self.config.micro_batch_tokens):
            part = [samples[index] for index in indices]
            with torch.no_grad():
                logprob_R, _ = logprobs(self.model, self._pack(part), keep_routing=self.config.keep_routing)
            sizes = [int(sample.trajectory.sampled.sum()) for sample in part]
            for sample, proximal in zip(part, logprob_R.split(sizes), strict=True):
                sample.proximal = proximal

    def _pack(self, samples: Sequence[Sample]) -> RolloutBatch:
        return pack_trajectories(
            [sample.trajectory for sample in samples],
            [sample.advantage for sample in samples],
            self.model.config.vocab_size,
            keep_routing=self.config.keep_routing,
            keep_sampling_masks=self.config.keep_sampling_masks,
            keep_selection=self.config.keep_selection,
        )

    def _objective(
        self,
        samples: Sequence[Sample],
        batch: RolloutBatch,
        logprob_R: torch.Tensor,
        reference_R: torch.Tensor,
        total: int,
    ) -> Objective:
        config = self.config
        arguments = (logprob_R, batch.old_logprob_R, reference_R, batch.sequence_R)
        if config.objective == "rft":
            passed_N = torch.tensor([float(sample.passed) for sample in samples])
            return rft_loss(*arguments, passed_N, total_sequences=total)
        proximal = [sample.proximal for sample in samples if sample.proximal is not None]
        return grpo_loss(
            *arguments,
            batch.advantage_N,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            kl_weight=torch.tensor([sample.kl_weight for sample in samples]),
            sequence_mask_threshold=config.sequence_mask_threshold,
            total_sequences=total,
            kl_estimator=config.kl_estimator,
            proximal_logprob_R=torch.cat(proximal) if proximal else None,
            importance_cap=config.importance_cap,
        )
