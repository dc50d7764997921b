"""Sparse attention for Hopper in Gluon: MQA with 512 latent columns (plus 64 of rope), heads in blocks of 64.

Two consumer warpgroups and a producer. Keys come in pairs of blocks of 64: warpgroup w multiplies the queries with
block w and holds columns [256 w, 256 w + 256) of the output. So each needs both blocks' probabilities: they pass
through shared memory, in the rope tile of their block, which nobody reads any more by then (the queries and two key
blocks fill the 227 KiB). The running maximum passes along: block 0 takes it over from block 1 of the pair before,
block 1 from block 0; it stays what it was until a score lies 2^8 times above it, so that the output is seldom
multiplied. The warpgroups run half a pair apart, so that one's softmax hides behind the other's products.

    warpgroup 0: S0 = Q K0'   softmax 0          O_left  += P0 V0       O_left += P1 V1
    warpgroup 1:              S1 = Q K1'         O_right += P0 V0, softmax 1      O_right += P1 V1

The producer gathers each block in two parts, ordered by when they come free: `own` (the value half of the warpgroup
that multiplies the block) and `other` (the other half, and rope). A persistent grid walks the (token, head block)
tiles, so that the gather of the next tile overlaps the end of this one.

Legend: T query tokens, S key rows, K selected keys, H heads, M = 64 heads of a tile, N = 64 keys of a block.
"""

import math

import torch
import triton
import triton.language as tl
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

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6, 3.7
PRODUCER_WARPS = gl.constexpr(4)  # as in WIDE and NARROW; 8 would leave the consumers too few registers
HALF = gl.constexpr(256)
LAZY = gl.constexpr(8.0)  # powers of two
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
FLAGS = gl.constexpr(  # of [4 warps, 1]: every thread holds all
    gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [2, 0]],
        lane_bases=[[0, 0], [0, 0], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0], [0, 0]],
        block_bases=[],
        shape=[4, 1],
    )
)
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))  # 16 bytes a thread, a row of 256 a warp
NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@triton.jit
def span_kernel(indices_ptr, span_ptr, key_rows, stride, KEYS: tl.constexpr, KEYS_PADDED: tl.constexpr):
    """Per row: the slots up to the last valid index (-1 - that where an index is no row of the keys), and a valid
    index."""
    row = tl.program_id(0).to(tl.int64)
    slot_K = tl.arange(0, KEYS_PADDED)
    index_K = tl.load(indices_ptr + row * stride + slot_K, mask=slot_K < KEYS, other=-1)
    length = tl.max(tl.where(index_K >= 0, slot_K + 1, 0), 0)
    broken = tl.max(((index_K >= key_rows) | (index_K < -1)).to(tl.int32), 0)
    tl.store(span_ptr + 2 * row, tl.where(broken > 0, -1 - length, length))
    tl.store(span_ptr + 2 * row + 1, tl.maximum(tl.max(tl.where(index_K < key_rows, index_K, -1), 0), 0))


@gluon.jit
def _arrive(barrier):
    # every warp of the partition has finished before its first thread reports that
    thread_barrier()
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _gather(destination, rows, column: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    """rows: pointers to the first column of each row."""
    column_D = column + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    async_copy.async_copy_global_to_shared(destination, gl.expand_dims(rows, 1) + gl.expand_dims(column_D, 0))


@gluon.jit
def _block_indices(indices_ptr, slot, KEYS: gl.constexpr, layout: gl.constexpr):
    slot_N = slot + gl.arange(0, 64, gl.SliceLayout(1, layout))
    return gl.load(indices_ptr + slot_N, mask=slot_N < KEYS, other=-1)


@gluon.jit
def _key_rows(kv_ptr, index_N, stand_in, key_rows, kv_stride):
    """An index that is no row reads a row that the token did select: the consumers mask its score, and its values are
    finite where the others are. Predicates on every copy would cost the producer a third of its instructions."""
    valid_N = (index_N >= 0) & (index_N < key_rows)
    # unsigned: one 32 x 32 -> 64 bit multiplication a row
    row_N = gl.where(valid_N, index_N, stand_in).to(gl.uint32).to(gl.uint64)
    return kv_ptr + row_N * kv_stride.to(gl.uint32).to(gl.uint64)


@gluon.jit
def _producer(
    memory, barriers, q_ptr, kv_ptr, indices_ptr, span_ptr, tiles, key_rows, q_stride_t, q_stride_h, kv_stride,
    indices_stride, KEYS: gl.constexpr, ROW_BLOCKS: gl.constexpr, HAS_REST: gl.constexpr,
):  # fmt: skip
    q, q_rest, own, other, rest = memory
    q_ready, q_free, own_ready, own_free, other_ready, other_free, _, _ = barriers
    pairs_done = 0
    tiles_done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = (tile // ROW_BLOCKS).to(gl.int64)
        head = (tile % ROW_BLOCKS) * 64
        row_indices = indices_ptr + token * indices_stride
        span = gl.load(span_ptr + 2 * token)
        pairs = (gl.maximum(span, -1 - span) + 127) // 128
        stand_in = gl.load(span_ptr + 2 * token + 1)

        index_N = _block_indices(row_indices, 0, KEYS, WIDE)
        if HAS_REST:
            rest_index_N = _block_indices(row_indices, 0, KEYS, NARROW)
        mbarrier.wait(q_free, (tiles_done & 1) ^ 1)
        q_row = q_ptr + token * q_stride_t
        head_M = head + gl.arange(0, 64, gl.SliceLayout(1, WIDE))
        _gather(q.index(0), q_row + head_M * q_stride_h, 0, HALF, WIDE)
        _gather(q.index(1), q_row + head_M * q_stride_h, HALF, HALF, WIDE)
        if HAS_REST:
            head_M = head + gl.arange(0, 64, gl.SliceLayout(1, NARROW))
            _gather(q_rest.index(0), q_row + head_M * q_stride_h, 2 * HALF, 64, NARROW)
        async_copy.mbarrier_arrive(q_ready, increment_count=False)

        for pair in range(pairs):
            free = (pairs_done & 1) ^ 1
            for block in gl.static_range(2):
                row_N = _key_rows(kv_ptr, index_N, stand_in, key_rows, kv_stride)
                # the indices of the next block travel while this one is gathered
                next_slot = pair * 128 + block * 64 + 64
                index_N = _block_indices(row_indices, next_slot, KEYS, WIDE)
                mbarrier.wait(own_free.index(block), free)
                _gather(own.index(block), row_N, block * HALF, HALF, WIDE)
                async_copy.mbarrier_arrive(own_ready.index(block), increment_count=False)
                mbarrier.wait(other_free.index(block), free)
                _gather(other.index(block), row_N, (1 - block) * HALF, HALF, WIDE)
                if HAS_REST:
                    row_N = _key_rows(kv_ptr, rest_index_N, stand_in, key_rows, kv_stride)
                    rest_index_N = _block_indices(row_indices, next_slot, KEYS, NARROW)
                    _gather(rest.index(block), row_N, 2 * HALF, 64, NARROW)
                async_copy.mbarrier_arrive(other_ready.index(block), increment_count=False)
            pairs_done += 1
        tiles_done += 1  # noqa: SIM113


@gluon.jit
def _scaled(acc, decay_M):
    return acc * gl.expand_dims(gl.convert_layout(decay_M, gl.SliceLayout(1, OUTPUT)), 1)


@gluon.jit
def _as_operand(p, dtype: gl.constexpr):
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, OUTPUT, 2))


@gluon.jit
def _raised(max_M, block_max_M):
    """(the reference that a block's scores are taken relative to, 1 where it rose in any row of the warp): it stays as
    long as no score is 2^LAZY times above it, so that the output is seldom to be multiplied."""
    raised_M = block_max_M > max_M + LAZY
    any_M = gl.inline_asm_elementwise(
        """
        {
        .reg .pred p, q;
        setp.ne.s32 p, $2, 0;
        setp.ne.s32 q, $3, 0;
        or.pred p, p, q;
        vote.sync.any.pred p, p, 0xffffffff;
        selp.b32 $0, 1, 0, p;
        selp.b32 $1, 1, 0, p;
        }
        """,
        "=&r,=&r,r,r",
        [raised_M.to(gl.int32)],
        dtype=gl.int32,
        is_pure=True,
        pack=2,
    )
    return gl.where(raised_M, block_max_M, max_M), any_M


@gluon.jit
def _rescaled(acc, decay_M, flag_row):
    """acc times decay_M, if that is not 1 in every row."""
    flags = flag_row._reinterpret(gl.int32, [4, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])).slice(0, 1, dim=1)
    if gl.max(gl.max(flags.load(FLAGS), 1), 0) > 0:
        acc = _scaled(acc, decay_M)
    return acc


@gluon.jit
def _publish(p, max_M, any_M, p_tile, max_row, flag_row, ready):
    """The block's probabilities and their reference, for the other warpgroup."""
    p_tile.store(p.to(p_tile.dtype))
    max_row.store(max_M)
    flag_row.store(any_M)
    fence_async_shared()
    _arrive(ready)


@gluon.jit
def _consumer(
    memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tiles, key_rows, scale_log2,
    indices_stride, nought, KEYS: gl.constexpr, HEADS: gl.constexpr, ROW_BLOCKS: gl.constexpr, HAS_REST: gl.constexpr,
    HAS_SINK: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    q, q_rest, own, other, rest = memory
    max_rows, sum_rows, flag_rows = exchange
    q_ready, q_free, own_ready, own_free, other_ready, other_free, p_ready, sum_ready = barriers
    rows: gl.constexpr = gl.SliceLayout(1, SCORES)
    dtype: gl.constexpr = own.dtype

    pairs_done = 0
    tiles_done = 0
    sums_done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = (tile // ROW_BLOCKS).to(gl.int64)
        head = (tile % ROW_BLOCKS) * 64
        row_indices = indices_ptr + token * indices_stride
        span = gl.load(span_ptr + 2 * token)
        pairs = (gl.maximum(span, -1 - span) + 127) // 128
        max_M = gl.full([64], -1e30, gl.float32, rows)  # finite: no inf - inf where nothing is selected
        sum_M = gl.zeros([64], gl.float32, rows)
        acc = gl.zeros([64, HALF], gl.float32, OUTPUT)
        mbarrier.wait(q_ready, tiles_done & 1)
        for pair in range(pairs):
            phase = pairs_done & 1
            # `nought` is 0, which the compiler does not know: else it computes the 44 descriptors of the products
            # before the loop and spills them
            zero = pair & nought
            first = zero
            second = zero + 1
            if W == 0:
                mine = first
                theirs = second
            else:
                mine = second
                theirs = first
            slot_N = pair * 128 + W * 64 + gl.arange(0, 64, gl.SliceLayout(0, SCORES))
            index_N = gl.load(row_indices + slot_N, mask=slot_N < KEYS, other=-1)
            mbarrier.wait(own_ready.index(W), phase)
            fence_async_shared()
            nothing = gl.zeros([64, 64], gl.float32, SCORES)
            score = warpgroup_mma(q.index(mine), own.index(mine).permute((1, 0)), nothing, use_acc=False, is_async=True)
            mbarrier.wait(other_ready.index(W), phase)
            fence_async_shared()
            score = warpgroup_mma(q.index(theirs), other.index(mine).permute((1, 0)), score, is_async=True)
            if HAS_REST:
                score = warpgroup_mma(q_rest.index(zero), rest.index(mine).permute((1, 0)), score, is_async=True)
            score = warpgroup_mma_wait(0, deps=[score])
            if pair == pairs - 1:
                _arrive(q_free)
            valid_N = (index_N >= 0) & (index_N < key_rows)
            score = gl.where(gl.expand_dims(valid_N, 0), score * scale_log2, float("-inf"))
            block_max_M = gl.max(score, 1)
            if W == 0:
                new_max_M, any_M = _raised(max_M, block_max_M)
                p = gl.exp2(score - gl.expand_dims(new_max_M, 1))
                decay_M = gl.exp2(max_M - new_max_M)
                _publish(p, new_max_M, any_M, rest.index(0), max_rows.index(0), flag_rows.index(0), p_ready.index(0))
                sum_M = sum_M * decay_M + gl.sum(p, 1)
                acc = _rescaled(acc, decay_M, flag_rows.index(0))
                acc = warpgroup_mma(_as_operand(p, dtype), own.index(first), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                _arrive(own_free.index(0))
                mbarrier.wait(p_ready.index(1), phase)
                max_M = max_rows.index(1).load(rows)
                decay_M = gl.exp2(new_max_M - max_M)
                sum_M = sum_M * decay_M
                acc = _rescaled(acc, decay_M, flag_rows.index(1))
                fence_async_shared()
                acc = warpgroup_mma(rest.index(second), other.index(second), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                _arrive(other_free.index(1))
            else:
                mbarrier.wait(p_ready.index(0), phase)
                new_max_M = max_rows.index(0).load(rows)
                decay_M = gl.exp2(max_M - new_max_M)
                sum_M = sum_M * decay_M
                acc = _rescaled(acc, decay_M, flag_rows.index(0))
                fence_async_shared()
                pending = warpgroup_mma(rest.index(first), other.index(first), acc, is_async=True)
                max_M, any_M = _raised(new_max_M, block_max_M)
                p = gl.exp2(score - gl.expand_dims(max_M, 1))
                decay_M = gl.exp2(new_max_M - max_M)
                _publish(p, max_M, any_M, rest.index(1), max_rows.index(1), flag_rows.index(1), p_ready.index(1))
                sum_M = sum_M * decay_M + gl.sum(p, 1)
                acc = warpgroup_mma_wait(0, deps=[pending])
                _arrive(other_free.index(0))
                acc = _rescaled(acc, decay_M, flag_rows.index(1))
                acc = warpgroup_mma(_as_operand(p, dtype), own.index(second), acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                _arrive(own_free.index(1))
            pairs_done += 1

        if pairs == 0:
            _arrive(q_free)
        else:
            # each warpgroup summed its own blocks; the maximum is common after the last pair
            sum_rows.index(W).store(sum_M)
            _arrive(sum_ready.index(W))
            mbarrier.wait(sum_ready.index(1 - W), sums_done & 1)
            other_sum_M = sum_rows.index(1 - W).load(rows)
            if W == 0:
                sum_M = sum_M + other_sum_M
            else:
                sum_M = other_sum_M + sum_M
            sums_done += 1
        head_M = head + gl.arange(0, 64, rows)
        empty_M = sum_M == 0.0
        lse_M = gl.where(empty_M, float("-inf"), (max_M + gl.log2(gl.where(empty_M, 1.0, sum_M))) * 0.6931471805599453)
        factor_M = gl.where(empty_M, 0.0, 1.0 / gl.where(empty_M, 1.0, sum_M))
        if HAS_SINK:
            factor_M = gl.where(empty_M, 0.0, factor_M / (1.0 + gl.exp(gl.load(sink_ptr + head_M) - lse_M)))
        if span < 0:
            factor_M = gl.full([64], float("nan"), gl.float32, rows)
            lse_M = gl.full([64], float("nan"), gl.float32, rows)
        if W == 0:
            gl.store(lse_ptr + token * HEADS + head_M, lse_M)
        out_M = token * HEADS + head + gl.arange(0, 64, gl.SliceLayout(1, OUTPUT))
        column_V = W * HALF + gl.arange(0, HALF, gl.SliceLayout(0, OUTPUT))
        pointers = out_ptr + gl.expand_dims(out_M * (2 * HALF), 1) + gl.expand_dims(column_V, 0)
        gl.store(pointers, _scaled(acc, factor_M).to(dtype))
        tiles_done += 1  # noqa: SIM113


@gluon.jit
def _allocate(dtype: gl.constexpr, READY: gl.constexpr):
    """(memory, exchange, barriers) of a program; READY: the producer's arrivals for each part of a block."""
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, HALF], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(dtype, [2, 64, HALF], wide)
    q_rest = gl.allocate_shared_memory(dtype, [1, 64, 64], narrow)
    own = gl.allocate_shared_memory(dtype, [2, 64, HALF], wide)
    other = gl.allocate_shared_memory(dtype, [2, 64, HALF], wide)
    rest = gl.allocate_shared_memory(dtype, [2, 64, 64], narrow)
    max_rows = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    sum_rows = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    flag_rows = gl.allocate_shared_memory(gl.int32, [2, 64], flat)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    own_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    own_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    other_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    other_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    p_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    sum_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(q_ready, count=32 * PRODUCER_WARPS)
    mbarrier.init(q_free, count=2)
    for i in gl.static_range(2):
        mbarrier.init(own_ready.index(i), count=READY)
        mbarrier.init(own_free.index(i), count=1)
        mbarrier.init(other_ready.index(i), count=READY)
        mbarrier.init(other_free.index(i), count=1)
        mbarrier.init(p_ready.index(i), count=1)
        mbarrier.init(sum_ready.index(i), count=1)
    fence_async_shared()
    thread_barrier()

    barriers = (q_ready, q_free, own_ready, own_free, other_ready, other_free, p_ready, sum_ready)
    return (q, q_rest, own, other, rest), (max_rows, sum_rows, flag_rows), barriers


@gluon.jit
def sparse_attention_hopper_kernel(
    q_ptr, kv_ptr, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tiles, key_rows, scale_log2, q_stride_t,
    q_stride_h, kv_stride, indices_stride, nought, KEYS: gl.constexpr, HEADS: gl.constexpr, ROW_BLOCKS: gl.constexpr,
    HAS_REST: gl.constexpr, HAS_SINK: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    memory, exchange, barriers = _allocate(dtype, 32 * PRODUCER_WARPS)
    gl.warp_specialize(
        [
            (_consumer, (
                memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tiles, key_rows,
                scale_log2, indices_stride, nought, KEYS, HEADS, ROW_BLOCKS, HAS_REST, HAS_SINK, gl.constexpr(0),
            )),
            (_consumer, (
                memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tiles, key_rows,
                scale_log2, indices_stride, nought, KEYS, HEADS, ROW_BLOCKS, HAS_REST, HAS_SINK, gl.constexpr(1),
            )),
            (_producer, (
                memory, barriers, q_ptr, kv_ptr, indices_ptr, span_ptr, tiles, key_rows, q_stride_t, q_stride_h,
                kv_stride, indices_stride, KEYS, ROW_BLOCKS, HAS_REST,
            )),
        ],
        [4, PRODUCER_WARPS],
        [200, 104],
    )  # fmt: skip


def supports(heads: int, dim: int, value_dim: int, dtype: torch.dtype, target: tuple[int, int]) -> bool:
    shapes = dim in (512, 576) and value_dim == 512 and heads % 64 == 0
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
    tiles = tokens * (heads // 64)
    sparse_attention_hopper_kernel[(min(tiles, processors(q_THD.device)),)](
        q_THD,
        kv_SD,
        indices_TK,
        span_T2,
        sink_H,
        out_THV,
        lse_TH,
        tiles,
        kv_SD.shape[0],
        scale * math.log2(math.e),
        q_THD.stride(0),
        q_THD.stride(1),
        kv_SD.stride(0),
        indices_TK.stride(0),
        0,
        KEYS=keys,
        HEADS=heads,
        ROW_BLOCKS=heads // 64,
        HAS_REST=dim == 576,
        HAS_SINK=sink_H is not None,
        num_warps=4,
    )
    return out_THV, lse_TH
