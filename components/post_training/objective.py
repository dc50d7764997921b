"""The terms of the GRPO objective (arXiv 2512.02556, section 3.1), pure functions of log-probabilities.

    J = E[ 1/G sum_i 1/|o_i| sum_t ( min(r A, clip(r, 1 - eps, 1 + eps) A) M - beta KL ) ]

Shape suffixes: N sequences (rollouts), R sampled tokens of all sequences, in order. sequence_R (int64 [R]) says which
sequence a token belongs to. All log-probabilities are in nats; pi_old is what the engine returned when it sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
    log_reference_ratio_R = reference_logprob_R - logprob_R
    ratio_R = (logprob_R - old_logprob_R).exp()
    return ratio_R * (log_reference_ratio_R.exp() - log_reference_ratio_R - 1)


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


def grpo_loss(
    logprob_R: torch.Tensor,
    old_logprob_R: torch.Tensor,
    reference_logprob_R: torch.Tensor,
    sequence_R: torch.Tensor,
    advantage_N: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    kl_weight: float,
    sequence_mask_threshold: float,
    total_sequences: int,
) -> Objective:
    """-J over these N sequences, divided by `total_sequences` so that micro-batches add up.

    The off-policy sequence mask multiplies the policy term and not the KL term, as the equation is printed.
    """
    sequences = advantage_N.shape[0]
    ratio_R = (logprob_R - old_logprob_R).exp()
    advantage_R = advantage_N[sequence_R]
    policy_R = clipped_policy_term(ratio_R, advantage_R, clip_low, clip_high)
    mask_N = off_policy_sequence_mask(logprob_R, old_logprob_R, sequence_R, advantage_N, sequence_mask_threshold)
    kl_R = unbiased_kl(logprob_R, old_logprob_R, reference_logprob_R)
    objective_N = sequence_mean(policy_R * mask_N[sequence_R] - kl_weight * kl_R, sequence_R, sequences)
    loss = -objective_N.sum() / total_sequences
    with torch.no_grad():
        clipped_R = ((advantage_R > 0) & (ratio_R > 1 + clip_high)) | ((advantage_R < 0) & (ratio_R < 1 - clip_low))
        return Objective(
            loss=loss,
            kl=float(kl_R.mean()),
            masked_share=float((~mask_N).float().mean()),
            clipped_share=float(clipped_R.float().mean()),
            ratio_max=float(ratio_R.max()),
        )
