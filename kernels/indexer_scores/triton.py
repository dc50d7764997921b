"""Indexer scores on a GPU: keys are the rows of the matrix product, (query, head) pairs its columns.

So the sum over heads runs along the columns, which one thread mostly holds itself. A block of queries stays in shared
memory while key tiles stream by; several programs share a multiprocessor, so that the ReLU and sum of one hide behind
the product of another. Many queries on Hopper: `kernels.indexer_scores.gluon`.

Legend: T query tokens, S keys, H heads (P: padded to a power of two), D head dim; in a program B queries, N = B*P
columns, M keys of a tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import capability, processors

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def load_queries(
    q_ptr, token, tokens, q_stride, HEADS: tl.constexpr, P: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr
):
    """[N, D] of the queries from `token` on; zero for padded heads and tokens past the end."""
    column_N = tl.arange(0, N)
    query_N = token + column_N // P
    head_N = column_N % P
    inside_N = (query_N < tokens) & (head_N < HEADS)
    offset_N = query_N.to(tl.int64) * q_stride + head_N * DIM
    return tl.load(q_ptr + offset_N[:, None] + tl.arange(0, DIM)[None, :], mask=inside_N[:, None], other=0.0)


@triton.jit
def load_weights(weight_ptr, q_scale_ptr, token, tokens, HEADS: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """[N] fp32 head weights, times the query scales where there are any."""
    column_N = tl.arange(0, N)
    query_N = token + column_N // P
    head_N = column_N % P
    inside_N = (query_N < tokens) & (head_N < HEADS)
    offset_N = query_N.to(tl.int64) * HEADS + head_N
    weight_N = tl.load(weight_ptr + offset_N, mask=inside_N, other=0.0).to(tl.float32)
    if q_scale_ptr is not None:
        weight_N *= tl.load(q_scale_ptr + offset_N, mask=inside_N, other=0.0)
    return weight_N


@triton.jit
def tile_scores(k_MD, q_ND, weight_N, B: tl.constexpr, P: tl.constexpr, UPCAST: tl.constexpr):
    """Scores [M, B] of a key tile."""
    if UPCAST:  # Triton's interpreter multiplies bf16 and fp8 wrongly
        product_MN = tl.dot(k_MD.to(tl.float32), tl.trans(q_ND.to(tl.float32)), input_precision="ieee")
    else:
        product_MN = tl.dot(k_MD, tl.trans(q_ND), input_precision="ieee")
    weighted_MN = tl.maximum(product_MN, 0.0) * weight_N[None, :]
    return tl.sum(tl.reshape(weighted_MN, [k_MD.shape[0], B, P]), 2)


@triton.jit
def cache_page(table_ptr, position_M, pages, PAGE: tl.constexpr):
    """The cache page of each position; a wrong entry of the table is cut to the cache, so that no read leaves it."""
    page_M = tl.load(table_ptr + position_M // PAGE).to(tl.int32)
    return tl.minimum(tl.maximum(page_M, 0), pages - 1)


@triton.jit
def score_range(
    out_ptr_B,  # where the score of key `first key` goes, per query
    q_ND,
    weight_N,
    k_ptr,
    k_scale_ptr,
    k_stride,
    start_B,
    end_B,
    present_B,
    low,
    high,
    keys,
    sample_stride,  # None: every key; else index i of the range means key `sample_origin + i * sample_stride`
    sample_origin,
    table_ptr,  # page table of this sequence; None: keys lie in one piece
    pages,
    page_stride,
    scale_page_stride,
    B: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    PAGE: tl.constexpr,  # rows of a page; a multiple of M means that no tile crosses pages: `low` has to be one too
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    DESCRIBED: tl.constexpr,  # k_ptr is a tensor descriptor with blocks [M, D]
):
    """Stores the scores of keys low <= key < high (-inf where a query does not see the key) at out_ptr_B + key."""
    SAMPLED: tl.constexpr = sample_stride is not None
    ONE_PAGE: tl.constexpr = (table_ptr is not None) and (PAGE % M == 0) and (sample_stride is None)
    # keys that every query of the block sees need no mask
    all_low = tl.max(tl.where(present_B, start_B, 0), 0)
    all_high = tl.min(tl.where(present_B, end_B, keys), 0)
    row_M = tl.arange(0, M)
    dim_D = tl.arange(0, DIM)
    for first in tl.range(low, high, M, num_stages=STAGES):
        index_M = first + row_M
        safe_M = tl.minimum(index_M, high - 1)  # page table entries past the range may be anything
        if SAMPLED:
            safe_M = sample_origin + safe_M * sample_stride
            key_M = safe_M
        else:
            key_M = index_M
        if ONE_PAGE:
            page = cache_page(table_ptr, first, pages, PAGE)
            place = first % PAGE
            k_page_ptr = k_ptr + page.to(tl.int64) * page_stride + place * k_stride
            k_MD = tl.load(k_page_ptr + row_M[:, None] * k_stride + dim_D[None, :])
        elif DESCRIBED:
            k_MD = k_ptr.load([first, 0])
        elif table_ptr is None:
            k_MD = tl.load(k_ptr + safe_M.to(tl.int64)[:, None] * k_stride + dim_D[None, :])
        else:
            page_M = cache_page(table_ptr, safe_M, pages, PAGE).to(tl.int64)
            row_offset_M = page_M * page_stride + (safe_M % PAGE) * k_stride
            k_MD = tl.load(k_ptr + row_offset_M[:, None] + dim_D[None, :])
        score_MB = tile_scores(k_MD, q_ND, weight_N, B, P, UPCAST)
        if k_scale_ptr is not None:
            if ONE_PAGE:
                scale_M = tl.load(k_scale_ptr + page.to(tl.int64) * scale_page_stride + place + row_M)
            elif table_ptr is None:
                scale_M = tl.load(k_scale_ptr + safe_M)
            else:
                scale_page_M = cache_page(table_ptr, safe_M, pages, PAGE).to(tl.int64)
                scale_M = tl.load(k_scale_ptr + scale_page_M * scale_page_stride + safe_M % PAGE)
            score_MB *= scale_M[:, None]
        if SAMPLED or (first < all_low) | (first + M > all_high):
            seen_MB = (key_M[:, None] >= start_B[None, :]) & (key_M[:, None] < end_B[None, :])
            score_MB = tl.where(seen_MB, score_MB, float("-inf"))
        inside_MB = (index_M < high)[:, None] & present_B[None, :]
        tl.store(out_ptr_B[None, :] + index_M[:, None], score_MB, mask=inside_MB)


@triton.jit
def block_range(start_ptr, end_ptr, token, tokens, keys, B: tl.constexpr):
    """(start_B, end_B, present_B, low, high): the key range of each query, cut to the keys, and of all together."""
    query_B = token + tl.arange(0, B)
    present_B = query_B < tokens
    end_B = tl.load(end_ptr + query_B, mask=present_B, other=0).to(tl.int32)
    end_B = tl.minimum(end_B, keys)
    if start_ptr is None:
        start_B = tl.zeros([B], tl.int32)
    else:
        start_B = tl.load(start_ptr + query_B, mask=present_B, other=2147483647).to(tl.int32)
    start_B = tl.maximum(start_B, 0)
    low = tl.minimum(tl.min(start_B, 0), keys)
    return start_B, end_B, present_B, low, tl.maximum(tl.max(end_B, 0), low)


@triton.jit
def indexer_scores_kernel(
    q_ptr,
    k_ptr,
    weight_ptr,
    q_scale_ptr,
    k_scale_ptr,
    start_ptr,
    end_ptr,
    out_ptr,
    tokens,
    keys,
    window,  # keys of a program
    q_stride,
    k_stride,
    out_stride,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
    DESCRIBED: tl.constexpr,
    FILL: tl.constexpr,  # -inf where no query of a block sees a key; else nothing is stored there
):
    # the last queries see the most keys in a causal batch: they go first
    token = (tl.num_programs(0) - 1 - tl.program_id(0)) * B
    begin = tl.program_id(1) * window
    finish = tl.minimum(begin + window, keys)
    start_B, end_B, present_B, low, high = block_range(start_ptr, end_ptr, token, tokens, keys, B)
    out_ptr_B = out_ptr + (token + tl.arange(0, B)).to(tl.int64) * out_stride
    low = tl.minimum(tl.maximum(low // M * M, begin), finish)
    high = tl.maximum(tl.minimum(high, finish), low)
    q_ND = load_queries(q_ptr, token, tokens, q_stride, HEADS, P, DIM, B * P)
    weight_N = load_weights(weight_ptr, q_scale_ptr, token, tokens, HEADS, P, B * P)
    score_range(
        out_ptr_B, q_ND, weight_N, k_ptr, k_scale_ptr, k_stride, start_B, end_B, present_B, low, high, keys,
        None, 0, None, 1, 0, 0, B, P, DIM, M, 1, STAGES, UPCAST, DESCRIBED,
    )  # fmt: skip
    if FILL:
        nothing_BM = tl.full([B, 4 * M], float("-inf"), tl.float32)
        row_F = tl.arange(0, 4 * M)
        for first in range(begin, low, 4 * M):
            key_F = first + row_F
            inside_BM = (key_F < low)[None, :] & present_B[:, None]
            tl.store(out_ptr_B[:, None] + key_F[None, :], nothing_BM, mask=inside_BM)
        for first in range(high, finish, 4 * M):
            key_F = first + row_F
            inside_BM = (key_F < finish)[None, :] & present_B[:, None]
            tl.store(out_ptr_B[:, None] + key_F[None, :], nothing_BM, mask=inside_BM)


def padded_heads(heads: int) -> int:
    return max(16, triton.next_power_of_2(heads))


def tile_shape(q_THD: Tensor, paged: bool = False) -> dict[str, int]:
    """Queries of a program, keys of a tile, pipeline stages and warps."""
    padded = padded_heads(q_THD.shape[1])
    hopper = capability(q_THD.device)[0] != 8
    if paged:
        return {"B": 1, "M": 64 if hopper else 32, "STAGES": 10 if hopper else 3, "num_warps": 4}
    columns = 256 if q_THD.dtype == torch.float8_e4m3fn and hopper else 128
    return {"B": max(1, columns // padded), "M": 64 if hopper else 32, "STAGES": 3, "num_warps": 4}


def aligned(k_SD: Tensor) -> bool:
    """Whether address and rows are such as the bulk copy engine takes."""
    return k_SD.data_ptr() % 16 == 0 and k_SD.stride(0) * k_SD.element_size() % 16 == 0


def empty_scores(q_THD: Tensor, k_SD: Tensor) -> Tensor:
    """[T, S] fp32 in rows of whole 64 bytes, which keep the stores of every row aligned."""
    tokens, keys = q_THD.shape[0], k_SD.shape[0]
    return torch.empty(tokens, triton.cdiv(keys, 16) * 16, dtype=torch.float32, device=q_THD.device)[:, :keys]


def describable(k_SD: Tensor) -> bool:
    """Whether the bulk copy engine (Hopper and later) loads the key tiles."""
    # of e4m3 tiles plain asynchronous copies were measured faster
    wide = k_SD.element_size() > 1 and k_SD.shape[1] * k_SD.element_size() >= 16
    return capability(k_SD.device) >= (9, 0) and aligned(k_SD) and wide


def launch(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    q_scale_TH: Tensor | None = None,
    k_scale_S: Tensor | None = None,
    shape: dict[str, int] | None = None,
    windows: int = 1,
    described: bool | None = None,
    fill: bool = True,
) -> Tensor:
    """`windows` splits the keys among programs (few queries); `described` loads key tiles by the bulk copy engine;
    without `fill` a row is undefined outside of its range (widened to whole 16 keys at its start)."""
    tokens, heads, dim = q_THD.shape
    keys = k_SD.shape[0]
    scores_TS = empty_scores(q_THD, k_SD)
    if tokens == 0 or keys == 0:
        return scores_TS
    if q_THD.stride(1) != dim:
        q_THD = q_THD.contiguous()
    shape = shape or tile_shape(q_THD)
    described = describable(k_SD) if described is None else described
    blocks = triton.cdiv(tokens, shape["B"])
    window = triton.cdiv(triton.cdiv(keys, windows), shape["M"]) * shape["M"]
    indexer_scores_kernel[(blocks, triton.cdiv(keys, window))](
        q_THD,
        TensorDescriptor.from_tensor(k_SD, [shape["M"], dim]) if described else k_SD,
        weight_TH,
        q_scale_TH,
        k_scale_S,
        key_start_T,
        key_end_T,
        scores_TS,
        tokens,
        keys,
        window,
        q_THD.stride(0),
        k_SD.stride(0),
        scores_TS.stride(0),
        HEADS=heads,
        P=padded_heads(heads),
        DIM=dim,
        UPCAST=INTERPRETED,
        DESCRIBED=described,
        FILL=fill,
        **shape,
    )
    return scores_TS


def hopper_kernel(q_THD: Tensor, k_SD: Tensor) -> bool:
    """Whether `kernels.indexer_scores.gluon` scores these queries: it wants enough of them, and of keys, to pay."""
    if capability(q_THD.device) != (9, 0):
        return False
    from kernels.indexer_scores import gluon

    enough = q_THD.shape[0] >= gluon.QUERIES * processors(q_THD.device) and k_SD.shape[0] >= 8192
    return enough and gluon.supports(q_THD, k_SD)


def scores(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    q_scale_TH: Tensor | None = None,
    k_scale_S: Tensor | None = None,
    shape: dict[str, int] | None = None,
    fill: bool = True,
    hopper: bool | None = None,
) -> Tensor:
    """By the kernel that is the fastest for them; `hopper` is as `hopper_kernel` says."""
    hopper = hopper_kernel(q_THD, k_SD) if hopper is None else hopper
    if not hopper or shape is not None:
        return launch(q_THD, k_SD, weight_TH, key_start_T, key_end_T, q_scale_TH, k_scale_S, shape, fill=fill)
    from kernels.indexer_scores import gluon

    scores_TS = empty_scores(q_THD, k_SD)
    gluon.launch(q_THD, k_SD, weight_TH, key_start_T, key_end_T, q_scale_TH, k_scale_S, scores_TS, fill=fill)
    return scores_TS


@torch.library.custom_op("sparseline::indexer_scores", mutates_args=())
def indexer_scores(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    q_scale_TH: Tensor | None = None,
    k_scale_S: Tensor | None = None,
) -> Tensor:
    """See `kernels.indexer_scores.indexer_scores`; fp32, bf16, fp16 or e4m3."""
    q_scale_TH = q_scale_TH.float().contiguous() if q_scale_TH is not None else None
    k_scale_S = k_scale_S.float() if k_scale_S is not None else None
    return scores(q_THD, k_SD, weight_TH.contiguous(), key_start_T, key_end_T, q_scale_TH, k_scale_S)


@indexer_scores.register_fake
def _(q_THD, k_SD, weight_TH, key_start_T, key_end_T, q_scale_TH=None, k_scale_S=None):
    keys = k_SD.shape[0]
    return q_THD.new_empty(q_THD.shape[0], (keys + 15) // 16 * 16, dtype=torch.float32)[:, :keys]
