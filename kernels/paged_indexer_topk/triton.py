"""Paged selection on a GPU: the fused kernel of `kernels.indexer_topk` reads keys through the page table.

One program serves one query token and a split of its keys; the splits' results are merged by the exact top-k, and a
last small kernel turns positions into cache rows. Many tokens over e4m3 keys on Hopper are the business of
`kernels.paged_indexer_topk.gluon`.

Legend: T query tokens, H heads, D head dim, K slots; cache pages P of S tokens; N sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.indexer_topk.triton import launch
from kernels.launch import capability


@triton.jit
def cache_rows_kernel(
    position_ptr, table_ptr, sequence_ptr, row_ptr, k, sequences, table_stride, page_size, BLOCK: tl.constexpr
):
    token = tl.program_id(0)
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sequence = tl.minimum(tl.maximum(tl.load(sequence_ptr + token), 0), sequences - 1).to(tl.int64)
    offset = token.to(tl.int64) * k + slot
    position = tl.load(position_ptr + offset, mask=slot < k, other=-1)
    used = position >= 0
    page = tl.load(table_ptr + sequence * table_stride + position // page_size, mask=used, other=0).to(tl.int32)
    tl.store(row_ptr + offset, tl.where(used, page * page_size + position % page_size, -1), mask=slot < k)


@torch.library.custom_op("sparseline::paged_indexer_topk", mutates_args=())
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
    """See `kernels.paged_indexer_topk.paged_indexer_topk`; fp32, bf16, fp16 or e4m3."""
    weight_TH = weight_TH.contiguous()
    q_scale_TH = q_scale_TH.float().contiguous() if q_scale_TH is not None else None
    k_scale_PS = k_scale_PS.float() if k_scale_PS is not None else None
    if capability(q_THD.device) == (9, 0):
        from kernels.paged_indexer_topk import gluon

        if gluon.supports(q_THD, k_cache_PSD, page_table_NP, k):
            return gluon.by_threshold(
                q_THD, k_cache_PSD, weight_TH, page_table_NP, sequence_T, key_end_T, k, q_scale_TH, k_scale_PS
            )
    positions_TK, lengths_T = launch(
        q_THD, k_cache_PSD, weight_TH, None, key_end_T, k, q_scale_TH, k_scale_PS, page_table_NP, sequence_T
    )
    rows_TK = torch.empty_like(positions_TK)
    if q_THD.shape[0] and page_table_NP.numel():
        block = min(1024, triton.next_power_of_2(k))
        cache_rows_kernel[(q_THD.shape[0], triton.cdiv(k, block))](
            positions_TK,
            page_table_NP,
            sequence_T,
            rows_TK,
            k,
            page_table_NP.shape[0],
            page_table_NP.stride(0),
            k_cache_PSD.shape[1],
            BLOCK=block,
        )
    else:
        rows_TK.fill_(-1)
    return rows_TK, positions_TK, lengths_T


@paged_indexer_topk.register_fake
def _(q_THD, k_cache_PSD, weight_TH, page_table_NP, sequence_T, key_end_T, k, q_scale_TH=None, k_scale_PS=None):
    tokens = q_THD.shape[0]
    rows_TK = q_THD.new_empty(tokens, k, dtype=torch.int32)
    return rows_TK, torch.empty_like(rows_TK), q_THD.new_empty(tokens, dtype=torch.int32)
