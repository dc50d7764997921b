"""Lightning indexer scores in plain PyTorch: the oracle, and what runs on a CPU.

Legend: T query tokens, S keys, H indexer heads, D head dim, C queries of a chunk.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 23  # elements of the [C, H, S] product held at once


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where a float64 operand is given (the oracle's use), else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def indexer_scores(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    q_scale_TH: Tensor | None = None,
    k_scale_S: Tensor | None = None,
) -> Tensor:
    """See `kernels.indexer_scores.indexer_scores`; any float dtype, products and sums in fp32 (float64 in float64)."""
    dtype = compute_dtype(q_THD, k_SD, weight_TH)
    tokens, heads, _ = q_THD.shape
    keys = k_SD.shape[0]
    weight_TH = weight_TH.to(dtype)
    if q_scale_TH is not None:
        weight_TH = weight_TH * q_scale_TH.to(dtype)
    k_DS = k_SD.to(dtype).t()
    position_S = torch.arange(keys, device=k_SD.device)
    scores_TS = q_THD.new_empty(tokens, keys, dtype=dtype)
    chunk = max(1, CHUNK_ELEMENTS // max(1, heads * keys))
    for first in range(0, tokens, chunk):
        rows = slice(first, first + chunk)
        product_CHS = torch.relu(q_THD[rows].to(dtype) @ k_DS)
        scores_CS = torch.bmm(weight_TH[rows, None], product_CHS)[:, 0]
        if k_scale_S is not None:
            scores_CS = scores_CS * k_scale_S.to(dtype)
        inside_CS = (position_S >= key_start_T[rows, None]) & (position_S < key_end_T[rows, None])
        scores_TS[rows] = scores_CS.masked_fill(~inside_CS, float("-inf"))
    return scores_TS
