"""Sparse attention in plain Triton: runs on every NVIDIA GPU from Ampere on, and in Triton's interpreter on a CPU.

One program holds ROWS rows of the score matrix, the (token, head) pairs of one key-value head that share a selection:
the heads of one token, or of `block` neighbouring tokens. It gathers BLOCK_K keys at a time and keeps the online
softmax in the base-2 domain. MQA is one group whose values are the first columns of its keys, so each row is read once.

Legend: T query tokens, S key rows, K selected keys per selection, H query heads, G key-value heads, D key width,
V value width, M rows of a program, N keys of a step, P splits of a selection.
"""

import math

import torch
import triton
import triton.language as tl

from kernels.launch import capability

INTERPRETED = triton.knobs.runtime.interpret
MAX_KEYS = 8192  # selected keys per row: they are scanned as one vector for the row's length


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    # the interpreter's bf16 product is wrong; fp32 operands must not be rounded to tf32
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def sparse_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    indices_ptr,
    key_end_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    tokens,
    key_rows,
    scale_log2,
    q_stride_t,
    q_stride_h,
    k_stride_s,
    k_stride_g,
    v_stride_s,
    v_stride_g,
    indices_stride,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEYS: tl.constexpr,
    KEYS_PADDED: tl.constexpr,
    MAIN: tl.constexpr,
    MAIN_PADDED: tl.constexpr,
    REST: tl.constexpr,
    REST_PADDED: tl.constexpr,
    VALUE: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_END: tl.constexpr,
    HAS_SINK: tl.constexpr,
    SPLITS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Key columns are MAIN (a power of two where possible) plus REST; SHARED: the values are the MAIN columns.

    SPLITS > 1: program (., p) takes the p-th part of the selection, and out and lse are [T, H, P, ...]; see
    sparse_decode.
    """
    per_group: tl.constexpr = HEADS // GROUPS
    row_blocks: tl.constexpr = (BLOCK * per_group + ROWS - 1) // ROWS
    program = tl.program_id(0)
    row_block = program % row_blocks
    group = (program // row_blocks) % GROUPS
    selection = program // (row_blocks * GROUPS)

    row_M = row_block * ROWS + tl.arange(0, ROWS)
    token_M = selection.to(tl.int64) * BLOCK + row_M // per_group
    head_M = group * per_group + row_M % per_group
    real_M = (row_M < BLOCK * per_group) & (token_M < tokens)

    indices_ptr += selection.to(tl.int64) * indices_stride
    slot_K = tl.arange(0, KEYS_PADDED)
    index_K = tl.load(indices_ptr + slot_K, mask=slot_K < KEYS, other=-1)
    length = tl.max(tl.where(index_K >= 0, slot_K + 1, 0), 0)
    # an index that is no row of the keys: nothing is read there, and the rows come out as NaN
    broken = tl.max(((index_K >= key_rows) | (index_K < -1)).to(tl.int32), 0)

    main_D = tl.arange(0, MAIN_PADDED)
    q_M = q_ptr + token_M * q_stride_t + head_M * q_stride_h
    q_MD = tl.load(q_M[:, None] + main_D[None, :], mask=real_M[:, None] & (main_D < MAIN)[None, :], other=0.0)
    if REST > 0:
        rest_D = tl.arange(0, REST_PADDED)
        q_rest_MD = tl.load(
            q_M[:, None] + (MAIN + rest_D)[None, :], mask=real_M[:, None] & (rest_D < REST)[None, :], other=0.0
        )
    if HAS_END:
        end_M = tl.load(key_end_ptr + token_M, mask=real_M, other=0)
    value_V = tl.arange(0, VALUE_PADDED)

    max_M = tl.full([ROWS], -1e30, tl.float32)  # finite: a row without keys must not compute inf - inf
    sum_M = tl.zeros([ROWS], tl.float32)
    acc_MV = tl.zeros([ROWS, VALUE_PADDED], tl.float32)
    part = (length + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    split = tl.program_id(1)
    for start in range(split * part, min(length, split * part + part), BLOCK_K):
        slot_N = start + tl.arange(0, BLOCK_K)
        index_N = tl.load(indices_ptr + slot_N, mask=slot_N < KEYS, other=-1)
        valid_N = (index_N >= 0) & (index_N < key_rows)
        row_N = k_ptr + tl.where(valid_N, index_N, 0).to(tl.int64) * k_stride_s + group * k_stride_g
        k_ND = tl.load(row_N[:, None] + main_D[None, :], mask=valid_N[:, None] & (main_D < MAIN)[None, :], other=0.0)
        score_MN = _dot(q_MD, tl.trans(k_ND), UPCAST)
        if REST > 0:
            k_rest_ND = tl.load(
                row_N[:, None] + (MAIN + rest_D)[None, :], mask=valid_N[:, None] & (rest_D < REST)[None, :], other=0.0
            )
            score_MN += _dot(q_rest_MD, tl.trans(k_rest_ND), UPCAST)
        seen_MN = valid_N[None, :]
        if HAS_END:
            seen_MN = seen_MN & (index_N[None, :] < end_M[:, None])
        score_MN = tl.where(seen_MN, score_MN * scale_log2, float("-inf"))
        new_max_M = tl.maximum(max_M, tl.max(score_MN, 1))
        p_MN = tl.exp2(score_MN - new_max_M[:, None])
        decay_M = tl.exp2(max_M - new_max_M)
        sum_M = sum_M * decay_M + tl.sum(p_MN, 1)
        max_M = new_max_M
        if SHARED:
            v_NV = k_ND
        else:
            v_row_N = v_ptr + tl.where(valid_N, index_N, 0).to(tl.int64) * v_stride_s + group * v_stride_g
            v_NV = tl.load(
                v_row_N[:, None] + value_V[None, :], mask=valid_N[:, None] & (value_V < VALUE)[None, :], other=0.0
            )
        acc_MV = acc_MV * decay_M[:, None] + _dot(p_MN.to(v_NV.dtype), v_NV, UPCAST)

    empty_M = sum_M == 0.0
    lse_M = tl.where(empty_M, float("-inf"), (max_M + tl.log2(tl.where(empty_M, 1.0, sum_M))) * 0.6931471805599453)
    factor_M = tl.where(empty_M, 0.0, 1.0 / tl.where(empty_M, 1.0, sum_M))
    if HAS_SINK:
        sink_M = tl.load(sink_ptr + head_M, mask=real_M, other=0.0)
        factor_M = tl.where(empty_M, 0.0, factor_M / (1.0 + tl.exp(sink_M - lse_M)))
    if broken > 0:
        factor_M = tl.full([ROWS], float("nan"), tl.float32)
        lse_M = factor_M
    # 0 x NaN from a poisoned value cannot reach an empty row: no key of it was read
    out_MV = acc_MV * factor_M[:, None]
    out_row_M = (token_M * HEADS + head_M) * SPLITS + split
    tl.store(
        out_ptr + out_row_M[:, None] * VALUE + value_V[None, :],
        out_MV.to(out_ptr.dtype.element_ty),
        mask=real_M[:, None] & (value_V < VALUE)[None, :],
    )
    tl.store(lse_ptr + out_row_M, lse_M, mask=real_M)


def split_columns(dim: int, value_dim: int, shared: bool) -> tuple[int, int]:
    """Key columns as MAIN + REST. Shared: MAIN are the values; else the largest power of two, as vectors are of that
    size."""
    main = value_dim if shared else dim if dim == triton.next_power_of_2(dim) else triton.next_power_of_2(dim) // 2
    return main, dim - main


def padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size)) if size else 0


def shape_of_program(rows: int, key_width: int, element_size: int, target: tuple[int, int]) -> dict[str, int]:
    """ROWS, BLOCK_K, num_warps, num_stages by (rows that share a selection, bytes of a key, compute capability)."""
    wide = key_width * element_size > 640  # MLA's latent rows, against GQA heads
    if element_size == 4:  # the fp32 mode is for tests and small models: small tiles, one stage
        return dict(ROWS=16, BLOCK_K=16 if wide else 32, num_warps=4, num_stages=1)
    if not wide:
        return dict(ROWS=16 if rows <= 16 else 32 if rows <= 32 else 64, BLOCK_K=64, num_warps=4, num_stages=2)
    if target >= (9, 0) and target < (12, 0):
        if rows > 32:
            return dict(ROWS=64, BLOCK_K=64, num_warps=8, num_stages=2)
        return dict(ROWS=16 if rows <= 16 else 32, BLOCK_K=64, num_warps=4, num_stages=2)
    if target in ((8, 0), (8, 7)):
        return dict(ROWS=16 if rows <= 16 else 32, BLOCK_K=32, num_warps=4, num_stages=2)
    return dict(ROWS=16, BLOCK_K=32, num_warps=4, num_stages=2)  # 99 KiB of shared memory


def constants(heads, groups, keys, dim, value_dim, shared, block, has_end, has_sink, dtype, target) -> dict:
    """The compile-time side of a launch; also what the ahead-of-time checks compile."""
    main, rest = split_columns(dim, value_dim, shared)
    shape = shape_of_program(block * heads // groups, padded(main) + padded(rest), dtype.itemsize, target)
    return dict(
        HEADS=heads,
        GROUPS=groups,
        KEYS=keys,
        KEYS_PADDED=padded(keys),
        MAIN=main,
        MAIN_PADDED=padded(main),
        REST=rest,
        REST_PADDED=padded(rest),
        VALUE=value_dim,
        VALUE_PADDED=padded(value_dim),
        SHARED=shared,
        BLOCK=block,
        HAS_END=has_end,
        HAS_SINK=has_sink,
        **shape,
    )


def sparse_attention(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor | None,
    indices_BK: torch.Tensor,
    scale: float,
    value_dim: int,
    sink_H: torch.Tensor | None = None,
    block: int = 1,
    key_end_T: torch.Tensor | None = None,
    splits: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel. v_SGV None: MQA with shared values. Arguments are checked by the caller; see the package.

    splits > 1 returns the parts, out [T, H, P, V] in fp32 and lse [T, H, P], each normalised by itself.
    """
    tokens, heads, dim = q_THD.shape
    groups, keys = k_SGD.shape[1], indices_BK.shape[1]
    parts = () if splits == 1 else (splits,)
    out_dtype = q_THD.dtype if splits == 1 else torch.float32
    out_THV = q_THD.new_empty(tokens, heads, *parts, value_dim, dtype=out_dtype)
    lse_TH = q_THD.new_empty(tokens, heads, *parts, dtype=torch.float32)
    values = k_SGD if v_SGV is None else v_SGV
    compiled = constants(
        heads, groups, keys, dim, value_dim, v_SGV is None, block, key_end_T is not None, sink_H is not None,
        q_THD.dtype, capability(q_THD.device),
    )  # fmt: skip
    row_blocks = triton.cdiv(block * heads // groups, compiled["ROWS"])
    sparse_attention_kernel[(indices_BK.shape[0] * groups * row_blocks, splits)](
        q_THD,
        k_SGD,
        values,
        indices_BK,
        key_end_T,
        sink_H,
        out_THV,
        lse_TH,
        tokens,
        k_SGD.shape[0],
        scale * math.log2(math.e),
        q_THD.stride(0),
        q_THD.stride(1),
        k_SGD.stride(0),
        k_SGD.stride(1),
        values.stride(0),
        values.stride(1),
        indices_BK.stride(0),
        SPLITS=splits,
        UPCAST=INTERPRETED and q_THD.dtype != torch.float32,
        **compiled,
    )
    return out_THV, lse_TH
