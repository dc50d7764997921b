"""Indexer scores and top-k over a paged key cache, in plain PyTorch: the oracle, and what runs on a CPU.

Legend: T query tokens, H indexer heads, D head dim, K slots; cache pages P of S tokens; N sequences, J pages of a
sequence in use, L = J*S padded positions, Q padded queries of a sequence.
"""

import torch
from torch import Tensor

from kernels.indexer_scores.reference import compute_dtype
from kernels.indexer_topk.reference import CHUNK_ELEMENTS, batched_scores
from kernels.topk.reference import topk

_ALIKE = 2  # binary orders of magnitude by which the queries of sequences computed together may differ


def padded_queries(sequence_T: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """(token_NQ, valid_NQ): the tokens of each sequence in their given order, padded to the longest."""
    device = sequence_T.device
    order_T = torch.argsort(sequence_T, stable=True)
    count_N = torch.bincount(sequence_T, minlength=sequences)
    first_N = count_N.cumsum(0) - count_N
    offset_Q = torch.arange(int(count_N.max()), device=device)
    place_NQ = (first_N[:, None] + offset_Q).clamp(max=sequence_T.shape[0] - 1)
    return order_T[place_NQ], offset_Q < count_N[:, None]


@torch.no_grad()
def paged_indexer_topk(
    q_THD: Tensor,
    k_cache_PSD: Tensor,
    weight_TH: Tensor,
    page_table_NP: Tensor,
    sequence_T: Tensor,
    key_end_T: Tensor,
    k: int,
    q_scale_TH: Tensor | None = None,
    k_scale_PS: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `kernels.paged_indexer_topk.paged_indexer_topk`; any float dtype. Each sequence's keys are gathered once."""
    tokens, device = q_THD.shape[0], q_THD.device
    rows_TK = torch.full((tokens, k), -1, dtype=torch.int32, device=device)
    positions_TK = torch.full((tokens, k), -1, dtype=torch.int32, device=device)
    lengths_T = torch.zeros(tokens, dtype=torch.int32, device=device)
    # sequences with about as many queries together: one long prompt must not pad what others decode to its length
    count_T = torch.bincount(sequence_T, minlength=1)[sequence_T]
    size_T = torch.log2(count_T.float()).div(_ALIKE).ceil()
    for size in size_T.unique().tolist():
        part_U = (size_T == size).nonzero().flatten()
        rows_TK[part_U], positions_TK[part_U], lengths_T[part_U] = _alike(
            q_THD[part_U],
            k_cache_PSD,
            weight_TH[part_U],
            page_table_NP,
            sequence_T[part_U],
            key_end_T[part_U],
            k,
            None if q_scale_TH is None else q_scale_TH[part_U],
            k_scale_PS,
        )
    return rows_TK, positions_TK, lengths_T


def _alike(
    q_THD: Tensor,
    k_cache_PSD: Tensor,
    weight_TH: Tensor,
    page_table_NP: Tensor,
    sequence_T: Tensor,
    key_end_T: Tensor,
    k: int,
    q_scale_TH: Tensor | None,
    k_scale_PS: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All sequences padded to the one with the most queries and to the one with the most keys."""
    dtype = compute_dtype(q_THD, k_cache_PSD, weight_TH)
    tokens, heads, dim = q_THD.shape
    page_size = k_cache_PSD.shape[1]
    device = q_THD.device
    rows_TK = torch.full((tokens, k), -1, dtype=torch.int32, device=device)
    positions_TK = torch.full((tokens, k), -1, dtype=torch.int32, device=device)
    lengths_T = torch.zeros(tokens, dtype=torch.int32, device=device)
    longest = int(key_end_T.max()) if tokens else 0
    if longest <= 0:
        return rows_TK, positions_TK, lengths_T
    weight_TH = weight_TH.to(dtype)
    if q_scale_TH is not None:
        weight_TH = weight_TH * q_scale_TH.to(dtype)
    sequence_N, sequence_T = torch.unique(sequence_T, return_inverse=True)
    page_NJ = page_table_NP[sequence_N, : -(-longest // page_size)].long().clamp(min=0)
    token_NQ, valid_NQ = padded_queries(sequence_T, page_NJ.shape[0])
    length_L = page_NJ.shape[1] * page_size
    position_L = torch.arange(length_L, device=device)
    queries = token_NQ.shape[1]
    per_sequence = heads * length_L
    at_once = max(1, CHUNK_ELEMENTS // (per_sequence * queries))
    chunk = max(1, CHUNK_ELEMENTS // per_sequence) if at_once == 1 else queries
    for first_sequence in range(0, page_NJ.shape[0], at_once):
        part = slice(first_sequence, first_sequence + at_once)
        cached_NJSD = k_cache_PSD.index_select(0, page_NJ[part].flatten()).to(dtype)
        keys_NDL = cached_NJSD.view(-1, length_L, dim).transpose(1, 2)
        for first in range(0, queries, chunk):
            token_NC, valid_NC = token_NQ[part, first : first + chunk], valid_NQ[part, first : first + chunk]
            scores_NCL = batched_scores(q_THD[token_NC].to(dtype), keys_NDL, weight_TH[token_NC])
            if k_scale_PS is not None:
                scores_NCL = scores_NCL * k_scale_PS[page_NJ[part]].to(dtype).view(-1, 1, length_L)
            end_NC = torch.where(valid_NC, key_end_T[token_NC].long(), 0)
            scores_NCL.masked_fill_(position_L >= end_NC[:, :, None], float("-inf"))
            position_MK, length_M = topk(scores_NCL.flatten(0, 1), k)
            valid_M = valid_NC.flatten()
            token_M, position_MK = token_NC.flatten()[valid_M], position_MK[valid_M]
            place_MK = position_MK.clamp(min=0).long()
            page_MK = page_NJ[sequence_T[token_M, None], place_MK // page_size]
            row_MK = (page_MK * page_size + place_MK % page_size).to(torch.int32)
            rows_TK[token_M] = torch.where(position_MK < 0, -1, row_MK)
            positions_TK[token_M] = position_MK
            lengths_T[token_M] = length_M[valid_M]
    return rows_TK, positions_TK, lengths_T
