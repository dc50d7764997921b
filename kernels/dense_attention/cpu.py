"""Dense causal attention of whole packed sequences on a CPU, by PyTorch's fused kernel: no score is stored, nothing is
padded, and the keys behind a query are never multiplied.

Legend: T query tokens, S key rows, H query heads, G key-value heads, D key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def causal_sequences(key_start_T: torch.Tensor, key_end_T: torch.Tensor) -> list[tuple[int, int, int]] | None:
    """(first query row, first key row, length) of each sequence; None where some query sees other keys than those of
    its own sequence up to itself."""
    starts, counts = torch.unique_consecutive(key_start_T, return_counts=True)
    first_rows = counts.cumsum(0) - counts
    rows = torch.arange(key_start_T.numel(), device=key_start_T.device)
    if not torch.equal(key_end_T.long(), rows + (starts.long() - first_rows).repeat_interleave(counts) + 1):
        return None
    return list(zip(first_rows.tolist(), starts.tolist(), counts.tolist(), strict=True))


def dense_attention_gqa(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor,
    sequences: list[tuple[int, int, int]],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiable in q, k and v. `sequences`: see `causal_sequences`. -> (out_THV, lse_TH)"""
    heads, width, value_dim = q_THD.shape[1], max(q_THD.shape[-1], v_SGV.shape[-1]), v_SGV.shape[-1]
    groups = k_SGD.shape[1]
    # the kernel wants one width and a key for every query head; zeros change neither scores nor the columns kept
    q_HTD = _pad(q_THD, width).transpose(0, 1)
    k_HSD, v_HSV = (
        _pad(x, width).unsqueeze(2).expand(-1, -1, heads // groups, -1).flatten(1, 2).transpose(0, 1)
        for x in (k_SGD, v_SGV)
    )
    parts = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_HTD[None, :, row : row + length],
            k_HSD[None, :, key : key + length],
            v_HSV[None, :, key : key + length],
            is_causal=True,
            scale=scale,
        )
        for row, key, length in sequences
    ]
    out_HTV = torch.cat([part[0][0, :, :, :value_dim] for part in parts], dim=1)
    lse_HT = torch.cat([part[1][0] for part in parts], dim=1)
    return out_HTV.transpose(0, 1), lse_HT.transpose(0, 1)


def _pad(x: torch.Tensor, width: int) -> torch.Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x
