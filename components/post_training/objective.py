"""The terms of the GRPO objective (arXiv 2512.02556, section 3.1), pure functions of log-probabilities.

    J = E[ 1/G sum_i 1/|o_i| sum_t ( min(r A, clip(r, 1 - eps, 1 + eps) A) M - beta KL ) ]

Shape suffixes: N sequences (rollouts), R sampled tokens of all sequences, in order. sequence_R (int64 [R]) says which
sequence a token belongs to. All log-probabilities are in nats; pi_old is what the engine returned when it sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

KLEstimator = Literal["unbiased", "biased"]


def group_advantages(reward_N: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
    """A_i = R_i - mean of its group. Without division by the standard deviation, unlike GRPO as first published."""
    groups = int(group_N.max()) + 1
    total = torch.zeros(groups, dtype=reward_N.dtype).index_add_(0, group_N, reward_N)
    count = torch.bincount(group_N, minlength=groups)
    return reward_N - (total / count)[group_N]


def sequence_mean(value_R: torch.Tensor, sequence_R: torch.Tensor, sequences: int) -> torch.Tensor:
    """1/|o_i| sum_t value: the mean over each sequence's tokens, [N]; 0 for a sequence without tokens."""
    total_N = value_R.new_zeros(sequences).index_add(0, sequence_R, value_R)
    return total_N / torch.bincount(sequence_R, minlength=sequences).clamp(min=1)


def clipped_policy_term(
    ratio_R: torch.Tensor, advantage_R: torch.Tensor, clip_low: float, clip_high: float
) -> torch.Tensor:
    """min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), to be maximised."""
    clipped_R = ratio_R.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(ratio_R * advantage_R, clipped_R * advantage_R)


def unbiased_kl(
    logprob_R: torch.Tensor, old_logprob_R: torch.Tensor, reference_logprob_R: torch.Tensor
) -> torch.Tensor:
    """r (pi_ref/pi - log(pi_ref/pi) - 1): the K3 estimate, weighted so that its gradient is unbiased off-policy.

    The gradient flows through the ratio r = pi / pi_old as well.
    """
    return (logprob_R - old_logprob_R).exp() * biased_kl(logprob_R, reference_logprob_R)


def biased_kl(logprob_R: torch.Tensor, reference_logprob_R: torch.Tensor) -> torch.Tensor:
    """pi_ref/pi - log(pi_ref/pi) - 1, plain K3: its gradient is not that of the KL. Kept to be compared with."""
    log_reference_ratio_R = reference_logprob_R - logprob_R
    return log_reference_ratio_R.exp() - log_reference_ratio_R - 1


def truncated_importance(proximal_logprob_R: torch.Tensor, engine_logprob_R: torch.Tensor, cap: float) -> torch.Tensor:
    """min(pi / pi_engine, cap), detached: what the engine's distribution differs by before the batch's first update."""
    return (proximal_logprob_R - engine_logprob_R).exp().clamp(max=cap).detach()


def length_penalised(
    reward_N: torch.Tensor, tokens_N: torch.Tensor, budget_N: torch.Tensor, weight: float
) -> torch.Tensor:
    """Reward less `weight` times the share of its token budget that a passed rollout used.

    A failed rollout loses nothing: giving up early is no merit, and a group that failed whole still teaches nothing.
    """
    used_N = (tokens_N / budget_N).clamp(max=1.0)
    return torch.where(reward_N == 1.0, reward_N - weight * used_N, reward_N)


def off_policy_sequence_mask(
    logprob_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    sequence_R: torch.Tensor,
    advantage_N: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """M_i [N] (bool): False where A_i < 0 and the mean over tokens of log(pi_old / pi) exceeds `threshold`."""
    with torch.no_grad():
        drift_N = sequence_mean(old_logprob_R - logprob_R, sequence_R, advantage_N.shape[0])
        return ~((advantage_N < 0) & (drift_N > threshold))


@dataclass
class Objective:
    """The loss to minimise, and what is logged (all detached)."""

    loss: torch.Tensor
    kl: float
    masked_share: float
    clipped_share: float
    ratio_max: float
    ratio_mean: float


def grpo_loss(
    logprob_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    reference_logprob_R: torch.Tensor,
    sequence_R: torch.Tensor,
    advantage_N: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float | torch.Tensor,
    sequence_mask_threshold: float | None,
    total_sequences: int,
    kl_estimator: KLEstimator = "unbiased",
    proximal_logprob_R: torch.Tensor | None = None,
    importance_cap: float | None = None,
) -> Objective:
    """-J over these N sequences, divided by `total_sequences` so that micro-batches add up.

    The off-policy sequence mask multiplies the policy term and not the KL term, as the equation is printed; it compares
    with old_logprob_R, what the engine returned. kl_weight: one beta, or one per sequence [N]. With `importance_cap`,
    the clipped ratio counts from proximal_logprob_R (the learner before the batch's first update), and the policy term
    is weighed by the truncated importance of that against the engine.
    """
    sequences = advantage_N.shape[0]
    ratio_R = (logprob_R - old_logprob_R).exp()
    advantage_R = advantage_N[sequence_R]
    if importance_cap is None:
        step_ratio_R = ratio_R
        policy_R = clipped_policy_term(ratio_R, advantage_R, clip_low, clip_high)
    else:
        if proximal_logprob_R is None:
            raise ValueError("importance_cap needs the learner's log-probabilities before the first update")
        step_ratio_R = (logprob_R - proximal_logprob_R).exp()
        importance_R = truncated_importance(proximal_logprob_R, old_logprob_R, importance_cap)
        policy_R = importance_R * clipped_policy_term(step_ratio_R, advantage_R, clip_low, clip_high)
    mask_N = torch.ones(sequences, dtype=torch.bool, device=advantage_N.device)
    if sequence_mask_threshold is not None:
        mask_N = off_policy_sequence_mask(logprob_R, old_logprob_R, sequence_R, advantage_N, sequence_mask_threshold)
    if kl_estimator == "unbiased":
        kl_R = unbiased_kl(logprob_R, old_logprob_R, reference_logprob_R)
    else:
        kl_R = biased_kl(logprob_R, reference_logprob_R)
    weight_R = kl_weight[sequence_R] if isinstance(kl_weight, torch.Tensor) else kl_weight
    objective_N = sequence_mean(policy_R * mask_N[sequence_R] - weight_R * kl_R, sequence_R, sequences)
    loss = -objective_N.sum() / total_sequences
    with torch.no_grad():
        raised_R = (advantage_R > 0) & (step_ratio_R > 1 + clip_high)
        lowered_R = (advantage_R < 0) & (step_ratio_R < 1 - clip_low)
        return Objective(
            loss=loss,
            kl=float(kl_R.mean()),
            masked_share=float((~mask_N).float().mean()),
            clipped_share=float((raised_R | lowered_R).float().mean()),
            ratio_max=float(ratio_R.max()),
            ratio_mean=float(ratio_R.mean()),
        )


def rft_loss(
    logprob_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    reference_logprob_R: torch.Tensor,
    sequence_R: torch.Tensor,
    passed_N: torch.Tensor,
    *,
    total_sequences: int,
) -> Objective:
    """Rejection-sampling fine-tuning: minus the mean log-probability of each passed sequence, over `total_sequences`.

    No clip, no mask, no KL: the KL to the reference is only logged.
    """
    sequences = passed_N.shape[0]
    loss = -(sequence_mean(logprob_R, sequence_R, sequences) * passed_N).sum() / total_sequences
    with torch.no_grad():
        ratio_R = (logprob_R - old_logprob_R).exp()
        kl_R = unbiased_kl(logprob_R, old_logprob_R, reference_logprob_R)
        return Objective(loss, float(kl_R.mean()), 0.0, 0.0, float(ratio_R.max()), float(ratio_R.mean()))
