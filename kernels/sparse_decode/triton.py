"""Split-K sparse attention for decoding, in plain Triton: the parts of a selection run beside each other, and a second
kernel combines them in a fixed order, so that the result is bitwise repeatable.

bf16 rows and GQA heads go through the parts of `kernels.sparse_attention.triton`; here are the 656-byte fp8 rows and
the combination. The fp8 values are never multiplied by their scale one by one: e4m3 is exact in bf16, and a tile's
scale multiplies the tile's share of the score, or the probability that weights it. Where many tokens and heads fill a
Hopper card, `kernels.sparse_decode.gluon` is faster.

Legend: T query tokens, H heads, P splits, K selected rows, M heads of a program, N rows of a step, V value width.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.launch import capability, processors
from kernels.sparse_attention import triton as sparse_kernels
from kernels.sparse_attention.triton import INTERPRETED, _dot

ROW_BYTES = tl.constexpr(656)
MAX_SPLITS = 16


@triton.jit
def _tile(cache_ptr, row_N, valid_N, tile: tl.constexpr, UPCAST: tl.constexpr):
    """128 values of each row in bf16, and their scales."""
    column_D = tile * 128 + tl.arange(0, 128)
    bytes_ND = tl.load(cache_ptr + row_N[:, None] + column_D[None, :], mask=valid_N[:, None], other=0)
    value_ND = bytes_ND.to(tl.float8e4nv, bitcast=True).to(tl.float32 if UPCAST else tl.bfloat16)
    scale_ptr = cache_ptr.to(tl.pointer_type(tl.float32))
    scale_N = tl.load(scale_ptr + row_N // 4 + 128 + tile, mask=valid_N, other=0.0)
    return value_ND, scale_N


@triton.jit
def sparse_decode_fp8_kernel(
    q_ptr,
    cache_ptr,
    rows_ptr,
    out_ptr,
    lse_ptr,
    cache_rows,
    scale_log2,
    q_stride_t,
    q_stride_h,
    rows_stride,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head_blocks: tl.constexpr = (HEADS + ROWS - 1) // ROWS
    token = (tl.program_id(0) // head_blocks).to(tl.int64)
    head_M = tl.program_id(0) % head_blocks * ROWS + tl.arange(0, ROWS)
    real_M = head_M < HEADS
    split = tl.program_id(1)

    rows_ptr += token * rows_stride
    slot_K = tl.arange(0, KEYS_PADDED)
    index_K = tl.load(rows_ptr + slot_K, mask=slot_K < KEYS, other=-1)
    length = tl.max(tl.where(index_K >= 0, slot_K + 1, 0), 0)
    broken = tl.max(((index_K >= cache_rows) | (index_K < -1)).to(tl.int32), 0)

    column_D = tl.arange(0, 128)
    q_M = (q_ptr + token * q_stride_t + head_M * q_stride_h)[:, None]
    q0_MD = tl.load(q_M + column_D[None, :], mask=real_M[:, None], other=0.0)
    q1_MD = tl.load(q_M + (128 + column_D)[None, :], mask=real_M[:, None], other=0.0)
    q2_MD = tl.load(q_M + (256 + column_D)[None, :], mask=real_M[:, None], other=0.0)
    q3_MD = tl.load(q_M + (384 + column_D)[None, :], mask=real_M[:, None], other=0.0)
    rope_D = tl.arange(0, 64)
    q4_MD = tl.load(q_M + (512 + rope_D)[None, :], mask=real_M[:, None], other=0.0)

    max_M = tl.full([ROWS], -1e30, tl.float32)  # finite: no inf - inf where nothing is selected
    sum_M = tl.zeros([ROWS], tl.float32)
    acc0_MV = tl.zeros([ROWS, 128], tl.float32)
    acc1_MV = tl.zeros([ROWS, 128], tl.float32)
    acc2_MV = tl.zeros([ROWS, 128], tl.float32)
    acc3_MV = tl.zeros([ROWS, 128], tl.float32)
    part = (length + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    for start in range(split * part, min(length, split * part + part), BLOCK_K):
        slot_N = start + tl.arange(0, BLOCK_K)
        index_N = tl.load(rows_ptr + slot_N, mask=slot_N < KEYS, other=-1)
        valid_N = (index_N >= 0) & (index_N < cache_rows)
        row_N = tl.where(valid_N, index_N, 0).to(tl.int64) * ROW_BYTES
        k0_ND, scale0_N = _tile(cache_ptr, row_N, valid_N, 0, UPCAST)
        k1_ND, scale1_N = _tile(cache_ptr, row_N, valid_N, 1, UPCAST)
        k2_ND, scale2_N = _tile(cache_ptr, row_N, valid_N, 2, UPCAST)
        k3_ND, scale3_N = _tile(cache_ptr, row_N, valid_N, 3, UPCAST)
        rope_ptr = cache_ptr.to(tl.pointer_type(tl.bfloat16))
        k4_ND = tl.load(rope_ptr + (row_N // 2 + 264)[:, None] + rope_D[None, :], mask=valid_N[:, None], other=0.0)
        score_MN = _dot(q4_MD, tl.trans(k4_ND), UPCAST)
        score_MN += _dot(q0_MD, tl.trans(k0_ND), UPCAST) * scale0_N[None, :]
        score_MN += _dot(q1_MD, tl.trans(k1_ND), UPCAST) * scale1_N[None, :]
        score_MN += _dot(q2_MD, tl.trans(k2_ND), UPCAST) * scale2_N[None, :]
        score_MN += _dot(q3_MD, tl.trans(k3_ND), UPCAST) * scale3_N[None, :]
        score_MN = tl.where(valid_N[None, :], score_MN * scale_log2, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MN, 1))
        p_MN = tl.exp2(score_MN - new_max_M[:, None])
        decay_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * decay_M + tl.sum(p_MN, 1)
        max_M = new_max_M
        acc0_MV = acc0_MV * decay_M[:, None] + _dot((p_MN * scale0_N[None, :]).to(k0_ND.dtype), k0_ND, UPCAST)
        acc1_MV = acc1_MV * decay_M[:, None] + _dot((p_MN * scale1_N[None, :]).to(k1_ND.dtype), k1_ND, UPCAST)
        acc2_MV = acc2_MV * decay_M[:, None] + _dot((p_MN * scale2_N[None, :]).to(k2_ND.dtype), k2_ND, UPCAST)
        acc3_MV = acc3_MV * decay_M[:, None] + _dot((p_MN * scale3_N[None, :]).to(k3_ND.dtype), k3_ND, UPCAST)

    empty_M = sum_M == 0.0
    lse_M = tl.where(empty_M, float("-inf"), (max_M + tl.log2(tl.where(empty_M, 1.0, sum_M))) * 0.6931471805599453)
    factor_M = tl.where(empty_M, 0.0, 1.0 / tl.where(empty_M, 1.0, sum_M))
    if broken > 0:
        factor_M = tl.full([ROWS], float("nan"), tl.float32)
        lse_M = factor_M
    out_row_M = (token * HEADS + head_M) * SPLITS + split
    out_MV = out_ptr + out_row_M[:, None] * 512 + column_D[None, :]
    tl.store(out_MV, acc0_MV * factor_M[:, None], mask=real_M[:, None])
    tl.store(out_MV + 128, acc1_MV * factor_M[:, None], mask=real_M[:, None])
    tl.store(out_MV + 256, acc2_MV * factor_M[:, None], mask=real_M[:, None])
    tl.store(out_MV + 384, acc3_MV * factor_M[:, None], mask=real_M[:, None])
    tl.store(lse_ptr + out_row_M, lse_M, mask=real_M)


@triton.jit
def combine_kernel(
    part_ptr,
    part_lse_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    HAS_SINK: tl.constexpr,
):
    """One (token, head): the parts weighted by exp(lse - max), summed in the order of the splits."""
    row = tl.program_id(0).to(tl.int64)
    split_P = tl.arange(0, SPLITS_PADDED)
    lse_P = tl.load(part_lse_ptr + row * SPLITS + split_P, mask=split_P < SPLITS, other=float("-inf"))
    broken = tl.max((lse_P != lse_P).to(tl.int32), 0)
    top = tl.maximum(tl.max(tl.where(lse_P == lse_P, lse_P, float("-inf")), 0), -1e30)
    total = tl.sum(tl.exp(lse_P - top), 0)
    lse = tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    value_V = tl.arange(0, VALUE_PADDED)
    acc_V = tl.zeros([VALUE_PADDED], tl.float32)
    for split in range(SPLITS):
        weight = tl.exp(tl.load(part_lse_ptr + row * SPLITS + split) - top)
        part_V = tl.load(part_ptr + (row * SPLITS + split) * VALUE + value_V, mask=value_V < VALUE, other=0.0)
        acc_V += weight * part_V
    factor = tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    if HAS_SINK:
        sink = tl.load(sink_ptr + row % HEADS)
        factor = tl.where(total > 0.0, factor / (1.0 + tl.exp(sink - lse)), 0.0)
    if broken > 0:
        factor = float("nan")
        lse = float("nan")
    tl.store(out_ptr + row * VALUE + value_V, (acc_V * factor).to(out_ptr.dtype.element_ty), mask=value_V < VALUE)
    tl.store(lse_ptr + row, lse)


def choose_splits(programs: int, resident: int, keys: int, device: torch.device) -> int:
    """As many as one wave of `resident` programs on each multiprocessor holds, with at least 128 keys each."""
    room = max(1, resident * processors(device) // max(1, programs))
    return max(1, min(MAX_SPLITS, 1 << (room.bit_length() - 1), keys // 128))


def combine(part, part_lse, sink_H, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, heads, splits, value_dim = part.shape
    out_THV = part.new_empty(tokens, heads, value_dim, dtype=dtype)
    lse_TH = part_lse.new_empty(tokens, heads)
    combine_kernel[(tokens * heads,)](
        part,
        part_lse,
        sink_H,
        out_THV,
        lse_TH,
        HEADS=heads,
        SPLITS=splits,
        SPLITS_PADDED=triton.next_power_of_2(splits),
        VALUE=value_dim,
        VALUE_PADDED=triton.next_power_of_2(value_dim),
        HAS_SINK=sink_H is not None,
        num_warps=4,
    )
    return out_THV, lse_TH


def sparse_decode(
    q_THD, k_SGD, v_SGV, rows_TK, scale: float, value_dim: int, sink_H, splits: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16, fp16 or fp32 caches as [rows, G, D]; v_SGV None: MQA with shared values."""
    tokens, heads, _ = q_THD.shape
    if splits is None:
        groups = k_SGD.shape[1]
        programs = tokens * groups * triton.cdiv(heads // groups, 64)
        resident = 1 if k_SGD[0, 0].numel() * k_SGD.element_size() > 640 else 8
        splits = choose_splits(programs, resident, rows_TK.shape[1], q_THD.device)
    if splits == 1:
        return sparse_kernels.sparse_attention(q_THD, k_SGD, v_SGV, rows_TK, scale, value_dim, sink_H)
    part, part_lse = sparse_kernels.sparse_attention(q_THD, k_SGD, v_SGV, rows_TK, scale, value_dim, splits=splits)
    return combine(part, part_lse, sink_H, q_THD.dtype)


def fp8_constants(heads: int, keys: int, target: tuple[int, int]) -> dict:
    hopper = target >= (9, 0) and target < (12, 0)
    rows = 16 if heads <= 16 or not hopper else 32 if heads <= 32 else 64
    return dict(
        HEADS=heads,
        KEYS=keys,
        KEYS_PADDED=max(16, triton.next_power_of_2(keys)),
        ROWS=rows,
        BLOCK_K=64 if rows == 64 else 32,
        num_warps=8 if rows == 64 else 4,
        num_stages=2,
    )


def sparse_decode_fp8(
    q_THD, cache_RB, rows_TK, scale: float, sink_H, splits: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """cache_RB [rows, 656] uint8."""
    tokens, heads, _ = q_THD.shape
    compiled = fp8_constants(heads, rows_TK.shape[1], capability(q_THD.device))
    programs = tokens * triton.cdiv(heads, compiled["ROWS"])
    if splits is None:
        resident = 1 if compiled["ROWS"] == 64 else 2
        splits = choose_splits(programs, resident, rows_TK.shape[1], q_THD.device)
    part = q_THD.new_empty(tokens, heads, splits, 512, dtype=torch.float32)
    part_lse = part.new_empty(tokens, heads, splits)
    sparse_decode_fp8_kernel[(programs, splits)](
        q_THD,
        cache_RB,
        rows_TK,
        part,
        part_lse,
        cache_RB.shape[0],
        scale * math.log2(math.e),
        q_THD.stride(0),
        q_THD.stride(1),
        rows_TK.stride(0),
        SPLITS=splits,
        UPCAST=INTERPRETED,
        **compiled,
    )
    return combine(part, part_lse, sink_H, q_THD.dtype)
