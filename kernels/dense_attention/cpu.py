"""Dense causal attention of whole packed sequences on a CPU, by PyTorch's fused kernel: no score is stored, nothing is
padded, and the keys behind a query are never multiplied.

Legend: T tokens, H heads, D key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_lengths(key_start_T: torch.Tensor, key_end_T: torch.Tensor, key_rows: int) -> list[int] | None:
    """Length of each sequence; None where the key rows are not those of the queries, or some query sees other keys than
    those of its own sequence up to itself."""
    starts, counts = torch.unique_consecutive(key_start_T, return_counts=True)
    rows = torch.arange(key_start_T.numel(), device=key_start_T.device)
    whole = key_rows == len(rows) and torch.equal(starts.long(), counts.cumsum(0) - counts)
    return counts.tolist() if whole and torch.equal(key_end_T.long(), rows + 1) else None


def dense_attention_gqa(
    q_THD: torch.Tensor, k_THD: torch.Tensor, v_THV: torch.Tensor, lengths: list[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiable in q, k and v; k and v have one or more heads of T rows. -> (out_THV, lse_TH)"""
    heads, value_dim = q_THD.shape[1], v_THV.shape[-1]
    width = max(q_THD.shape[-1], value_dim)
    # the kernel wants one width and a key for every query head; zeros change neither scores nor the columns kept
    k_THD, v_THV = (x.unsqueeze(2).expand(-1, -1, heads // x.shape[1], -1).flatten(1, 2) for x in (k_THD, v_THV))
    # split, not sliced: one gradient for all sequences, instead of as many of full size to add up
    split = [_pad(x, width).transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q_THD, k_THD, v_THV)]
    parts = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=True, scale=scale)
        for q, k, v in zip(*split, strict=True)
    ]
    out_HTV = torch.cat([part[0][0] for part in parts], dim=1)[..., :value_dim]
    lse_HT = torch.cat([part[1][0] for part in parts], dim=1)
    return out_HTV.transpose(0, 1), lse_HT.transpose(0, 1)


def _pad(x: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
