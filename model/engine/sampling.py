"""Drawing tokens: temperature, top-p, and a random number per (seed, position) that no batch composition changes.

Shape suffixes: B sequences, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


class LogitMask(Protocol):
    """What structured output plugs into: which tokens may come next in a sequence."""

    def allowed(self, token_ids: list[int]) -> torch.Tensor:
        """bool [V]; at least one entry must be True."""
        ...


@dataclass(frozen=True)
class SamplingParameters:
    """temperature 0 is greedy; max_new_tokens counts the tokens of one turn."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    seed: int = 0
    logit_mask: LogitMask | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")


def uniform(seed_B: np.ndarray, position_B: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per (seed, position): splitmix64, float64 [B]."""
    with np.errstate(over="ignore"):
        z = seed_B.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + position_B.astype(np.uint64)
        for _ in range(2):
            z = z + np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def top_p_mask(probability_BV: torch.Tensor, top_p_B: torch.Tensor) -> torch.Tensor:
    """bool [B, V]: the smallest set of most probable tokens whose mass reaches top_p; ties go to the lower id."""
    ordered, order = probability_BV.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    keep = before < top_p_B[:, None]
    return torch.zeros_like(keep).scatter_(1, order, keep)


def sample(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_p_B: torch.Tensor,
    uniform_B: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Token ids [B], their log-probabilities [B] (nats) under the distribution drawn from, and the mask that top-p
    kept [B, V] (None when no sequence cuts). A greedy sequence reports its log-probability at temperature 1.
    """
    greedy_B = temperature_B == 0
    scaled_BV = logits_BV.double() / torch.where(greedy_B, 1.0, temperature_B)[:, None]
    logprob_BV = scaled_BV.log_softmax(dim=-1)
    mask_BV = None
    if bool((top_p_B < 1).any()):
        mask_BV = top_p_mask(logprob_BV.exp(), torch.where(greedy_B, 1.0, top_p_B))
        logprob_BV = scaled_BV.masked_fill(~mask_BV, float("-inf")).log_softmax(dim=-1)
    cumulative_BV = logprob_BV.exp().cumsum(dim=-1)
    threshold_B = uniform_B * cumulative_BV[:, -1]
    drawn_B = torch.searchsorted(cumulative_BV, threshold_B[:, None], right=True).squeeze(1)
    drawn_B = drawn_B.clamp(max=logits_BV.shape[1] - 1)
    token_B = torch.where(greedy_B, logits_BV.argmax(dim=-1), drawn_B)
    return token_B, logprob_BV.gather(1, token_B[:, None]).squeeze(1).float(), mask_BV
