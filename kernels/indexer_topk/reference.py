"""Indexer scores and top-k without an L x L matrix, in plain PyTorch: the oracle, and what runs on a CPU.

Legend: T query tokens, S keys, H indexer heads, D head dim, K slots; N pieces of a tile with Q padded queries and L
padded keys each (`kernels.packing`), M = N * Q.
"""

import torch
from torch import Tensor

from kernels.indexer_scores.reference import compute_dtype
from kernels.packing import plan_tiles
from kernels.topk.reference import topk

CHUNK_ELEMENTS = 1 << 23  # elements of the [N, Q, H, L] product held at once


def batched_scores(q_NQHD: Tensor, k_NDL: Tensor, weight_NQH: Tensor) -> Tensor:
    """Scores [N, Q, L] of every query of a piece with every key of the piece."""
    pieces, queries, heads, dim = q_NQHD.shape
    keys = k_NDL.shape[2]
    product = torch.bmm(q_NQHD.reshape(pieces, queries * heads, dim), k_NDL).relu_()
    weight = weight_NQH.reshape(pieces * queries, 1, heads)
    return torch.bmm(weight, product.view(pieces * queries, heads, keys)).view(pieces, queries, keys)


@torch.no_grad()
def indexer_topk(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    q_scale_TH: Tensor | None = None,
    k_scale_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.indexer_topk.indexer_topk`; any float dtype. Memory grows with tile x keys, never rows x keys."""
    dtype = compute_dtype(q_THD, k_SD, weight_TH)
    tokens, heads, _ = q_THD.shape
    device = q_THD.device
    indices_TK = torch.full((tokens, k), -1, dtype=torch.int32, device=device)
    lengths_T = torch.zeros(tokens, dtype=torch.int32, device=device)
    if k_SD.shape[0] == 0:
        return indices_TK, lengths_T
    weight_TH = weight_TH.to(dtype)
    if q_scale_TH is not None:
        weight_TH = weight_TH * q_scale_TH.to(dtype)
    for tile in plan_tiles(key_start_T, key_end_T, heads, CHUNK_ELEMENTS):
        # an empty range may start behind the last key
        key_NL = tile.keys_NL.clamp(max=k_SD.shape[0] - 1)
        k_NDL = k_SD[key_NL].to(dtype).transpose(1, 2)
        scores_NQL = batched_scores(q_THD[tile.rows_NQ].to(dtype), k_NDL, weight_TH[tile.rows_NQ])
        if k_scale_S is not None:
            scores_NQL = scores_NQL * k_scale_S[key_NL].to(dtype)[:, None]
        scores_NQL.masked_fill_(~tile.valid_NQL, float("-inf"))
        local_MK, length_M = topk(scores_NQL.flatten(0, 1), k)
        start_M1 = tile.keys_NL[:, :1].expand_as(tile.rows_NQ).reshape(-1, 1)
        global_MK = torch.where(local_MK < 0, -1, local_MK + start_M1.to(torch.int32))
        real_M, row_M = tile.real_NQ.flatten(), tile.rows_NQ.flatten()
        indices_TK[row_M[real_M]] = global_MK[real_M]
        lengths_T[row_M[real_M]] = length_M[real_M]
    return indices_TK, lengths_T
