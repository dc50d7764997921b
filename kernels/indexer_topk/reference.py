"""Indexer scores and top-k without an L x L matrix, in plain PyTorch: the oracle, and what runs on a CPU.

Legend: T query tokens, S keys, H indexer heads, D head dim, K slots; R runs of a group, Q padded queries of a run,
C queries of a chunk, L padded keys of a run.
"""

import torch
from torch import Tensor

from kernels.indexer_scores.reference import compute_dtype
from kernels.indexer_topk.runs import groups
from kernels.topk.reference import topk

CHUNK_ELEMENTS = 1 << 23  # elements of the [R, C, H, L] product held at once


def batched_scores(q_RCHD: Tensor, k_RDL: Tensor, weight_RCH: Tensor) -> Tensor:
    """Scores [R, C, L] of every query of a run with every key of the run."""
    runs, queries, heads, dim = q_RCHD.shape
    keys = k_RDL.shape[2]
    product = torch.bmm(q_RCHD.reshape(runs, queries * heads, dim), k_RDL).relu_()
    weight = weight_RCH.reshape(runs * queries, 1, heads)
    return torch.bmm(weight, product.view(runs * queries, heads, keys)).view(runs, queries, keys)


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
    """See `kernels.indexer_topk.indexer_topk`; any float dtype. Memory grows with chunk x keys, never rows x keys."""
    dtype = compute_dtype(q_THD, k_SD, weight_TH)
    tokens, heads, _ = q_THD.shape
    device = q_THD.device
    indices_TK = torch.full((tokens, k), -1, dtype=torch.int32, device=device)
    lengths_T = torch.zeros(tokens, dtype=torch.int32, device=device)
    weight_TH = weight_TH.to(dtype)
    if q_scale_TH is not None:
        weight_TH = weight_TH * q_scale_TH.to(dtype)
    for group in groups(key_start_T, key_end_T):
        if group.keys == 0:
            continue
        offset_L = torch.arange(group.keys, device=device)
        key_RL = (group.key_start_R[:, None] + offset_L).clamp(max=k_SD.shape[0] - 1)
        k_RDL = k_SD[key_RL].to(dtype).transpose(1, 2)
        queries = group.row_RQ.shape[1]
        per_run = heads * group.keys
        runs_at_once = max(1, CHUNK_ELEMENTS // (per_run * queries))
        chunk = max(1, CHUNK_ELEMENTS // per_run) if runs_at_once == 1 else queries
        for first_run in range(0, group.row_RQ.shape[0], runs_at_once):
            runs = slice(first_run, first_run + runs_at_once)
            for first in range(0, queries, chunk):
                row_RC = group.row_RQ[runs, first : first + chunk]
                valid_RC = group.valid_RQ[runs, first : first + chunk]
                scores_RCL = batched_scores(q_THD[row_RC].to(dtype), k_RDL[runs], weight_TH[row_RC])
                if k_scale_S is not None:
                    scores_RCL = scores_RCL * k_scale_S[key_RL[runs]].to(dtype)[:, None]
                end_RC = torch.where(valid_RC, key_end_T[row_RC].long() - group.key_start_R[runs, None], 0)
                scores_RCL.masked_fill_(offset_L >= end_RC[:, :, None], float("-inf"))
                local_MK, length_M = topk(scores_RCL.flatten(0, 1), k)
                start_M1 = group.key_start_R[runs, None].expand_as(row_RC).reshape(-1, 1)
                global_MK = torch.where(local_MK < 0, -1, local_MK + start_M1.to(torch.int32))
                valid_M, row_M = valid_RC.flatten(), row_RC.flatten()
                indices_TK[row_M[valid_M]] = global_MK[valid_M]
                lengths_T[row_M[valid_M]] = length_M[valid_M]
    return indices_TK, lengths_T
