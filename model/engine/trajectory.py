"""What the engine produced for one sequence, exactly as it produced it. Text is never re-tokenised."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Trajectory:
    """One sequence of L tokens.

    token_ids: int64 [L], prompt, sampled tokens and injected replies in order.
    sampled: bool [L], True where the policy sampled the token (what is trained on).
    logprobs: fp32 [L], log-probability (nats) of each sampled token under the distribution it was drawn from
        (temperature and top-p applied); 0 elsewhere.
    weight_versions: int64 [L], version of the weights that sampled the token; -1 elsewhere.
    routing: int16 [MoE layers, fed, experts per token], expert ids of every token that went through the network; the
        last sampled token never does, so fed = L - 1.
    selections: int32 [layers, fed, index_topk], positions that each fed token attended to, -1 behind the last; None
        when they were not recorded.
    sampling_masks: for each sampled token, in order, the int32 ids that top-p kept; None when nothing was cut.
    """

    token_ids: torch.Tensor
    sampled: torch.Tensor
    logprobs: torch.Tensor
    weight_versions: torch.Tensor
    routing: torch.Tensor
    sampling_masks: list[torch.Tensor] | None
    temperature: float
    finish_reason: str
    selections: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.token_ids.shape[0]
