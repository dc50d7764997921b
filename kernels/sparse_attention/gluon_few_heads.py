"""Sparse attention for Hopper in Gluon with up to 16 heads: a shard after tensor parallelism.

A warpgroup product has at least 64 rows, so here the keys are the rows and the heads the columns: S' = K Q' and
O' += V' P'. Nothing is padded but the heads up to 16, and the gather sets the pace. A producer fills two blocks of 64
keys; each consumer warpgroup owns one of them, with a maximum, sum and output of its own, and they are combined once
per token.

Legend: T query tokens, S key rows, K selected keys, M = 16 heads, N = 64 keys of a block, V = 512 value columns.
"""

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.launch import processors
from kernels.sparse_attention.gluon import (
    NARROW,
    WIDE,
    _arrive,
    _block_indices,
    _gather,
    _key_rows,
    span_kernel,
    thread_barrier,
)

TURNED = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))  # [keys or values, heads]


@gluon.jit
def _producer(
    memory, barriers, q_ptr, kv_ptr, indices_ptr, span_ptr, tokens, key_rows, q_stride_t, q_stride_h, kv_stride,
    indices_stride, KEYS: gl.constexpr, HEADS: gl.constexpr, HAS_REST: gl.constexpr,
):  # fmt: skip
    q, q_rest, keys, rest = memory
    q_ready, q_free, ready, free, _, _ = barriers
    pairs_done = 0
    tiles_done = 0
    for tile in range(gl.program_id(0), tokens, gl.num_programs(0)):
        token = tile.to(gl.int64)
        row_indices = indices_ptr + token * indices_stride
        span = gl.load(span_ptr + 2 * token)
        stand_in = gl.load(span_ptr + 2 * token + 1)
        pairs = (gl.maximum(span, -1 - span) + 127) // 128
        index_N = _block_indices(row_indices, 0, KEYS, WIDE)
        if HAS_REST:
            rest_index_N = _block_indices(row_indices, 0, KEYS, NARROW)
        mbarrier.wait(q_free, (tiles_done & 1) ^ 1)
        q_row = q_ptr + token * q_stride_t
        head_M = gl.minimum(gl.arange(0, 16, gl.SliceLayout(1, WIDE)), HEADS - 1)
        _gather(q.index(0), q_row + head_M * q_stride_h, 0, 512, WIDE)
        if HAS_REST:
            head_M = gl.minimum(gl.arange(0, 16, gl.SliceLayout(1, NARROW)), HEADS - 1)
            _gather(q_rest.index(0), q_row + head_M * q_stride_h, 512, 64, NARROW)
        async_copy.mbarrier_arrive(q_ready, increment_count=False)
        for pair in range(pairs):
            for block in gl.static_range(2):
                row_N = _key_rows(kv_ptr, index_N, stand_in, key_rows, kv_stride)
                next_slot = pair * 128 + block * 64 + 64
                index_N = _block_indices(row_indices, next_slot, KEYS, WIDE)
                if HAS_REST:
                    rest_row_N = _key_rows(kv_ptr, rest_index_N, stand_in, key_rows, kv_stride)
                    rest_index_N = _block_indices(row_indices, next_slot, KEYS, NARROW)
                mbarrier.wait(free.index(block), (pairs_done & 1) ^ 1)
                _gather(keys.index(block), row_N, 0, 512, WIDE)
                if HAS_REST:
                    _gather(rest.index(block), rest_row_N, 512, 64, NARROW)
                async_copy.mbarrier_arrive(ready.index(block), increment_count=False)
            pairs_done += 1
        tiles_done += 1  # noqa: SIM113


@gluon.jit
def _consumer(
    memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tokens, key_rows, scale_log2,
    indices_stride, nought, KEYS: gl.constexpr, HEADS: gl.constexpr, HAS_REST: gl.constexpr, HAS_SINK: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    q, q_rest, keys, rest = memory
    p_tiles, other_acc, other_max, other_sum = exchange
    q_ready, q_free, ready, free, full, taken = barriers
    columns: gl.constexpr = gl.SliceLayout(0, TURNED)
    pairs_done = 0
    tiles_done = 0
    exchanged = 0
    for tile in range(gl.program_id(0), tokens, gl.num_programs(0)):
        token = tile.to(gl.int64)
        row_indices = indices_ptr + token * indices_stride
        span = gl.load(span_ptr + 2 * token)
        pairs = (gl.maximum(span, -1 - span) + 127) // 128
        max_M = gl.full([16], -1e30, gl.float32, columns)  # finite: no inf - inf where nothing is selected
        sum_M = gl.zeros([16], gl.float32, columns)
        acc_VM = gl.zeros([512, 16], gl.float32, TURNED)
        mbarrier.wait(q_ready, tiles_done & 1)
        for pair in range(pairs):
            # `nought` is 0, which the compiler does not know: it must not compute all descriptors before the loop
            zero = pair & nought
            mine = zero + W
            slot_N = pair * 128 + W * 64 + gl.arange(0, 64, gl.SliceLayout(1, TURNED))
            index_N = gl.load(row_indices + slot_N, mask=slot_N < KEYS, other=-1)
            mbarrier.wait(ready.index(W), pairs_done & 1)
            fence_async_shared()
            nothing = gl.zeros([64, 16], gl.float32, TURNED)
            score_NM = warpgroup_mma(
                keys.index(mine), q.index(zero).permute((1, 0)), nothing, use_acc=False, is_async=True
            )
            if HAS_REST:
                score_NM = warpgroup_mma(rest.index(mine), q_rest.index(zero).permute((1, 0)), score_NM, is_async=True)
            score_NM = warpgroup_mma_wait(0, deps=[score_NM])
            if pair == pairs - 1:
                _arrive(q_free)
            valid_N = (index_N >= 0) & (index_N < key_rows)
            score_NM = gl.where(gl.expand_dims(valid_N, 1), score_NM * scale_log2, float("-inf"))
            new_max_M = gl.maximum(max_M, gl.max(score_NM, 0))
            p_NM = gl.exp2(score_NM - gl.expand_dims(new_max_M, 0))
            decay_M = gl.exp2(max_M - new_max_M)
            p_tiles.index(W).store(p_NM.to(keys.dtype))
            fence_async_shared()
            thread_barrier()
            acc_VM = warpgroup_mma(
                keys.index(mine).permute((1, 0)),
                p_tiles.index(mine),
                acc_VM * gl.expand_dims(decay_M, 0),
                is_async=True,
            )
            sum_M = sum_M * decay_M + gl.sum(p_NM, 0)
            max_M = new_max_M
            acc_VM = warpgroup_mma_wait(0, deps=[acc_VM])
            _arrive(free.index(W))
            pairs_done += 1

        if pairs == 0:
            _arrive(q_free)
        else:
            if W == 1:
                mbarrier.wait(taken, (exchanged & 1) ^ 1)
                other_acc.store(acc_VM)
                other_max.store(max_M)
                other_sum.store(sum_M)
                _arrive(full)
            else:
                mbarrier.wait(full, exchanged & 1)
                theirs_M = other_max.load(columns)
                total_max_M = gl.maximum(max_M, theirs_M)
                ours_M = gl.exp2(max_M - total_max_M)
                theirs_M = gl.exp2(theirs_M - total_max_M)
                sum_M = sum_M * ours_M + other_sum.load(columns) * theirs_M
                acc_VM = acc_VM * gl.expand_dims(ours_M, 0) + other_acc.load(TURNED) * gl.expand_dims(theirs_M, 0)
                max_M = total_max_M
                _arrive(taken)
            exchanged += 1
        if W == 0:
            head_M = gl.arange(0, 16, columns)
            real_M = head_M < HEADS
            empty_M = sum_M == 0.0
            sum_M = gl.where(empty_M, 1.0, sum_M)
            lse_M = gl.where(empty_M, float("-inf"), (max_M + gl.log2(sum_M)) * 0.6931471805599453)
            factor_M = gl.where(empty_M, 0.0, 1.0 / sum_M)
            if HAS_SINK:
                sink_M = gl.load(sink_ptr + head_M, mask=real_M, other=0.0)
                factor_M = gl.where(empty_M, 0.0, factor_M / (1.0 + gl.exp(sink_M - lse_M)))
            if span < 0:
                factor_M = gl.full([16], float("nan"), gl.float32, columns)
                lse_M = gl.full([16], float("nan"), gl.float32, columns)
            gl.store(lse_ptr + token * HEADS + head_M, lse_M, mask=real_M)
            value_V = gl.arange(0, 512, gl.SliceLayout(1, TURNED))
            row_M = out_ptr + (token * HEADS + head_M) * 512
            pointers = gl.expand_dims(row_M, 0) + gl.expand_dims(value_V, 1)
            out_VM = (acc_VM * gl.expand_dims(factor_M, 0)).to(keys.dtype)
            gl.store(pointers, out_VM, mask=gl.expand_dims(real_M, 0))
        tiles_done += 1  # noqa: SIM113


@gluon.jit
def sparse_attention_few_heads_kernel(
    q_ptr, kv_ptr, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tokens, key_rows, scale_log2, q_stride_t,
    q_stride_h, kv_stride, indices_stride, nought, KEYS: gl.constexpr, HEADS: gl.constexpr, HAS_REST: gl.constexpr,
    HAS_SINK: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 512], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(dtype, [1, 16, 512], gl.NVMMASharedLayout.get_default_for([16, 512], dtype))
    q_rest = gl.allocate_shared_memory(dtype, [1, 16, 64], gl.NVMMASharedLayout.get_default_for([16, 64], dtype))
    keys = gl.allocate_shared_memory(dtype, [2, 64, 512], wide)
    rest = gl.allocate_shared_memory(dtype, [2, 64, 64], narrow)
    p_tiles = gl.allocate_shared_memory(dtype, [2, 64, 16], gl.NVMMASharedLayout.get_default_for([64, 16], dtype))
    other_acc = gl.allocate_shared_memory(gl.float32, [512, 16], plain)
    other_max = gl.allocate_shared_memory(gl.float32, [16], flat)
    other_sum = gl.allocate_shared_memory(gl.float32, [16], flat)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    taken = gl.allocate_shared_memory(gl.int64, [1], barrier)
    mbarrier.init(q_ready, count=128)
    mbarrier.init(q_free, count=2)
    mbarrier.init(full, count=1)
    mbarrier.init(taken, count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=128)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    thread_barrier()

    memory = (q, q_rest, keys, rest)
    exchange = (p_tiles, other_acc, other_max, other_sum)
    barriers = (q_ready, q_free, ready, free, full, taken)
    gl.warp_specialize(
        [
            (_consumer, (
                memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tokens, key_rows,
                scale_log2, indices_stride, nought, KEYS, HEADS, HAS_REST, HAS_SINK, gl.constexpr(0),
            )),
            (_consumer, (
                memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tokens, key_rows,
                scale_log2, indices_stride, nought, KEYS, HEADS, HAS_REST, HAS_SINK, gl.constexpr(1),
            )),
            (_producer, (
                memory, barriers, q_ptr, kv_ptr, indices_ptr, span_ptr, tokens, key_rows, q_stride_t, q_stride_h,
                kv_stride, indices_stride, KEYS, HEADS, HAS_REST,
            )),
        ],
        [4, 4],
        [168, 168],
    )  # fmt: skip


def supports(heads: int, dim: int, value_dim: int, dtype: torch.dtype, target: tuple[int, int]) -> bool:
    shapes = dim in (512, 576) and value_dim == 512 and 0 < heads <= 16
    return target == (9, 0) and shapes and dtype in (torch.bfloat16, torch.float16)


def sparse_attention(
    q_THD: torch.Tensor, kv_SD: torch.Tensor, indices_TK: torch.Tensor, scale: float, sink_H: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel where `supports` says so. Arguments are checked by the caller; see the package."""
    (tokens, heads, dim), keys = q_THD.shape, indices_TK.shape[1]
    out_THV = q_THD.new_empty(tokens, heads, 512)
    lse_TH = q_THD.new_empty(tokens, heads, dtype=torch.float32)
    span_T2 = torch.empty(tokens, 2, dtype=torch.int32, device=q_THD.device)
    span_kernel[(tokens,)](
        indices_TK, span_T2, kv_SD.shape[0], indices_TK.stride(0), KEYS=keys, KEYS_PADDED=triton.next_power_of_2(keys)
    )
    sparse_attention_few_heads_kernel[(min(tokens, processors(q_THD.device)),)](
        q_THD,
        kv_SD,
        indices_TK,
        span_T2,
        sink_H,
        out_THV,
        lse_TH,
        tokens,
        kv_SD.shape[0],
        scale * math.log2(math.e),
        q_THD.stride(0),
        q_THD.stride(1),
        kv_SD.stride(0),
        indices_TK.stride(0),
        0,
        KEYS=keys,
        HEADS=heads,
        HAS_REST=dim == 576,
        HAS_SINK=sink_H is not None,
        num_warps=4,
    )
    return out_THV, lse_TH
