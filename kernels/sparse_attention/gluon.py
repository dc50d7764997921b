"""Sparse attention for Hopper in Gluon: MQA with 512 latent columns (plus 64 of rope), heads in blocks of 64.

Two consumer warpgroups and a producer. Keys come in pairs of blocks of 64: warpgroup w multiplies the queries with
block w and holds columns [256 w, 256 w + 256) of the output. So each needs both blocks' probabilities: they pass
through shared memory, in the rope tile of their block, which nobody reads any more by then (the queries and two key
blocks fill the 227 KiB). The running maximum passes along: block 0 takes it over from block 1 of the pair before,
block 1 from block 0; it stays what it was until a score lies 2^8 times above it, so that the output is seldom
multiplied. The warpgroups run half a pair apart, so that one's softmax hides behind the other's products.

    warpgroup 0: S0 = Q K0'   softmax 0          O_left  += P0 V0       O_left += P1 V1
    warpgroup 1:              S1 = Q K1'         O_right += P0 V0, softmax 1      O_right += P1 V1

The producer gathers each block in quarters of 128 columns, and each is given back as soon as its product is done: those
that the group which scores the block also holds the output of first, then the others, and rope. A persistent grid walks
the (token, head block) tiles, so that the gather of the next tile overlaps the end of this one. All programs change
their tiles at about the same time: the queries of the next tile are asked into the L2 cache before, and the output
leaves in whole sectors, since the loads of the next tile pass through the same unit.

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
PRODUCER_WARPS = gl.constexpr(4)  # as in NARROW; 8 would leave the consumers too few registers
QUARTER = gl.constexpr(128)  # of the value columns
LAZY = gl.constexpr(8.0)  # powers of two
EARLY = gl.constexpr(4)  # pairs of blocks before its end, a tile asks for the queries of the next
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
# 16 bytes a thread, 128 of four rows a warp: a thread has four rows of a block, whose addresses serve all columns
NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# [heads, columns of a quarter] on the way to memory: eight columns of a head side by side in a thread. Two steps, each
# by exchange between neighbouring lanes: both at once would pass through shared memory, of which none is left.
HALFWAY = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
)
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )
)


def _rescaling() -> str:
    """Assembly: 64 values of a thread, in rows r and r + 8 by turns of two, times the decays of their rows, unless
    those are 1 in all rows of the warp."""
    products = "\n".join(f"mul.f32 ${i}, ${i}, ${128 + i % 4};" for i in range(64))
    return f"""
    {{
    .reg .pred p;
    setp.neu.f32 p, $128, 0f3F800000;
    setp.neu.or.f32 p, $130, 0f3F800000, p;
    vote.sync.any.pred p, p, 0xffffffff;
    @!p bra UNCHANGED;
    {products}
    UNCHANGED:
    }}
    """


RESCALING = gl.constexpr(_rescaling())
RESCALED = gl.constexpr(",".join(["=f"] * 64 + [str(i) for i in range(64)] + ["f"] * 64))


@triton.jit
def span_kernel(indices_ptr, span_ptr, key_rows, stride, KEYS: tl.constexpr, KEYS_PADDED: tl.constexpr):
    """Per row: the slots up to the last valid index (-1 - that where an index is no row of the keys), a valid
    index, and the slots before the first that is not valid."""
    row = tl.program_id(0).to(tl.int64)
    slot_K = tl.arange(0, KEYS_PADDED)
    index_K = tl.load(indices_ptr + row * stride + slot_K, mask=slot_K < KEYS, other=-1)
    length = tl.max(tl.where(index_K >= 0, slot_K + 1, 0), 0)
    broken = tl.max(((index_K >= key_rows) | (index_K < -1)).to(tl.int32), 0)
    valid_K = (index_K >= 0) & (index_K < key_rows)
    tl.store(span_ptr + 3 * row, tl.where(broken > 0, -1 - length, length))
    tl.store(span_ptr + 3 * row + 1, tl.maximum(tl.max(tl.where(valid_K, index_K, -1), 0), 0))
    tl.store(span_ptr + 3 * row + 2, tl.min(tl.where(valid_K, KEYS_PADDED, slot_K), 0))


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
def _ask_for_queries(q_ptr, tile, q_stride_t, q_stride_h, ROW_BLOCKS: gl.constexpr, HAS_REST: gl.constexpr):
    """Brings the queries of a tile into the L2 cache, where they lie on 16 bytes."""
    BYTES: gl.constexpr = 512 + 64 * HAS_REST  # half of a head
    part_P = gl.arange(0, 128, LINE)
    head_P = tile % ROW_BLOCKS * 64 + part_P // 2
    q_P = (q_ptr + (tile // ROW_BLOCKS).to(gl.int64) * q_stride_t + head_P * q_stride_h).to(gl.int64)
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred p;
        .reg .b64 offset;
        and.b64 offset, $1, 15;
        setp.eq.s64 p, offset, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, 0;
        }
        """,
        "=r,l,r",
        [q_P + part_P % 2 * BYTES, gl.full([128], BYTES, gl.int32, LINE)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _gather_quarter(keys, row_N, B: gl.constexpr, I: gl.constexpr):
    _gather(keys.index(4 * B + I), row_N, I * QUARTER, QUARTER, NARROW)


@gluon.jit
def _load_queries(q, q_rest, q_ptr, tile, q_stride_t, q_stride_h, ROW_BLOCKS: gl.constexpr, HAS_REST: gl.constexpr):
    head_M = tile % ROW_BLOCKS * 64 + gl.arange(0, 64, gl.SliceLayout(1, NARROW))
    row_M = q_ptr + (tile // ROW_BLOCKS).to(gl.int64) * q_stride_t + head_M * q_stride_h
    for quarter in gl.static_range(4):
        _gather(q.index(quarter), row_M, quarter * QUARTER, QUARTER, NARROW)
    if HAS_REST:
        _gather(q_rest.index(0), row_M, 4 * QUARTER, 64, NARROW)


@gluon.jit
def _producer(
    memory, barriers, q_ptr, kv_ptr, indices_ptr, span_ptr, tiles, key_rows, q_stride_t, q_stride_h, kv_stride,
    indices_stride, KEYS: gl.constexpr, ROW_BLOCKS: gl.constexpr, HAS_REST: gl.constexpr,
):  # fmt: skip
    q, q_rest, keys, rest = memory
    q_ready, q_free, ready, free, _, _ = barriers
    pairs_done = 0
    tiles_done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = (tile // ROW_BLOCKS).to(gl.int64)
        row_indices = indices_ptr + token * indices_stride
        # the indices of a block travel while the two before it are gathered
        even_N = _block_indices(row_indices, 0, KEYS, NARROW)
        odd_N = _block_indices(row_indices, 64, KEYS, NARROW)
        span = gl.load(span_ptr + 3 * token)
        stand_in = gl.load(span_ptr + 3 * token + 1)
        pairs = (gl.maximum(span, -1 - span) + 127) // 128
        mbarrier.wait(q_free, (tiles_done & 1) ^ 1)
        _load_queries(q, q_rest, q_ptr, tile, q_stride_t, q_stride_h, ROW_BLOCKS, HAS_REST)
        async_copy.mbarrier_arrive(q_ready, increment_count=False)

        for pair in range(pairs):
            phase = (pairs_done & 1) ^ 1
            for block in gl.static_range(2):
                if block == 0:
                    row_N = _key_rows(kv_ptr, even_N, stand_in, key_rows, kv_stride)
                    even_N = _block_indices(row_indices, pair * 128 + 128, KEYS, NARROW)
                else:
                    row_N = _key_rows(kv_ptr, odd_N, stand_in, key_rows, kv_stride)
                    odd_N = _block_indices(row_indices, pair * 128 + 192, KEYS, NARROW)
                for i in gl.static_range(4):
                    mbarrier.wait(free.index(4 * block + (2 * block + i) % 4), phase)
                    _gather_quarter(keys, row_N, block, (2 * block + i) % 4)
                    if HAS_REST and i == 3:
                        _gather(rest.index(block), row_N, 4 * QUARTER, 64, NARROW)
                    async_copy.mbarrier_arrive(ready.index(4 * block + (2 * block + i) % 4), increment_count=False)
            next_tile = tile + gl.num_programs(0)
            if (pair == gl.maximum(pairs - EARLY, 0)) & (next_tile < tiles):
                _ask_for_queries(q_ptr, next_tile, q_stride_t, q_stride_h, ROW_BLOCKS, HAS_REST)
            pairs_done += 1
        tiles_done += 1  # noqa: SIM113


@gluon.jit
def _store_quarter(row_ptr, column, acc, factor_M, dtype: gl.constexpr):
    """Stores a quarter of the output; row_ptr: of the first head."""
    words = gl.convert_layout(_scaled(acc, factor_M).to(dtype).to(gl.int16, bitcast=True), HALFWAY)
    # the compiler must not see that two steps are one
    words = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=gl.int16, is_pure=True, pack=2)
    words = gl.convert_layout(words, STORED)
    head_M = gl.arange(0, 64, gl.SliceLayout(1, STORED))
    column_V = column + gl.arange(0, QUARTER, gl.SliceLayout(0, STORED))
    pointers = row_ptr + gl.expand_dims(head_M * (4 * QUARTER), 1) + gl.expand_dims(column_V, 0)
    gl.store(pointers, words.to(dtype, bitcast=True))


@gluon.jit
def _scaled(acc, decay_M):
    return acc * gl.expand_dims(gl.convert_layout(decay_M, gl.SliceLayout(1, OUTPUT)), 1)


@gluon.jit
def _as_operand(p, dtype: gl.constexpr):
    return gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, OUTPUT, 2))


@gluon.jit
def _raised(max_M, block_max_M):
    """The reference that a block's scores are taken relative to: it stays as long as no score is 2^LAZY times above it,
    so that the output is seldom to be multiplied."""
    return gl.where(block_max_M > max_M + LAZY, block_max_M, max_M)


@gluon.jit
def _rescaled(acc, decay_M):
    """acc times decay_M. Each warp looks whether that is 1 in all of its rows."""
    decay = gl.expand_dims(gl.convert_layout(decay_M, gl.SliceLayout(1, OUTPUT)), 1).broadcast_to(acc.shape)
    return gl.inline_asm_elementwise(RESCALING, RESCALED, [acc, decay], dtype=gl.float32, is_pure=True, pack=64)


@gluon.jit
def _publish(p, max_M, p_tile, max_row, ready):
    """The block's probabilities and their reference, for the other warpgroup."""
    p_tile.store(p.to(p_tile.dtype))
    max_row.store(max_M)
    fence_async_shared()
    _arrive(ready)


@gluon.jit
def _multiply_keys(q, q_rest, keys, rest, ready, phase, zero, HAS_REST: gl.constexpr, W: gl.constexpr):
    """Issues Q K' of block W, a quarter of the columns after the other, as they arrive."""
    score = gl.zeros([64, 64], gl.float32, SCORES)
    for i in gl.static_range(4):
        mbarrier.wait(ready.index(4 * W + (2 * W + i) % 4), phase)
        fence_async_shared()
        key_tile = keys.index(zero + 4 * W + (2 * W + i) % 4).permute((1, 0))
        score = warpgroup_mma(q.index(zero + (2 * W + i) % 4), key_tile, score, use_acc=i > 0, is_async=True)
    if HAS_REST:
        score = warpgroup_mma(q_rest.index(zero), rest.index(zero + W).permute((1, 0)), score, is_async=True)
    return score


@gluon.jit
def _multiply_values(p, keys, left, right, zero, B: gl.constexpr, W: gl.constexpr):
    """Issues the product of block B's probabilities with the values of warpgroup W's columns, left ones first."""
    left = warpgroup_mma(p, keys.index(zero + 4 * B + 2 * W), left, is_async=True)
    right = warpgroup_mma(p, keys.index(zero + 4 * B + 2 * W + 1), right, is_async=True)
    return left, right


@gluon.jit
def _finish_values(left, right, free, B: gl.constexpr, W: gl.constexpr):
    left = warpgroup_mma_wait(1, deps=[left])
    _arrive(free.index(4 * B + 2 * W))
    right = warpgroup_mma_wait(0, deps=[right])
    _arrive(free.index(4 * B + 2 * W + 1))
    return left, right


@gluon.jit
def _consumer(
    memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tiles, key_rows, scale_log2,
    indices_stride, nought, KEYS: gl.constexpr, HEADS: gl.constexpr, ROW_BLOCKS: gl.constexpr, HAS_REST: gl.constexpr,
    HAS_SINK: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    q, q_rest, keys, rest = memory
    max_rows, sum_rows = exchange
    q_ready, q_free, ready, free, p_ready, sum_ready = barriers
    rows: gl.constexpr = gl.SliceLayout(1, SCORES)
    dtype: gl.constexpr = keys.dtype

    pairs_done = 0
    tiles_done = 0
    sums_done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = (tile // ROW_BLOCKS).to(gl.int64)
        head = (tile % ROW_BLOCKS) * 64
        row_indices = indices_ptr + token * indices_stride
        span = gl.load(span_ptr + 3 * token)
        whole = gl.load(span_ptr + 3 * token + 2)
        pairs = (gl.maximum(span, -1 - span) + 127) // 128
        max_M = gl.full([64], -1e30, gl.float32, rows)  # finite: no inf - inf where nothing is selected
        sum_M = gl.zeros([64], gl.float32, rows)
        left = gl.zeros([64, QUARTER], gl.float32, OUTPUT)
        right = gl.zeros([64, QUARTER], gl.float32, OUTPUT)
        mbarrier.wait(q_ready, tiles_done & 1)
        for pair in range(pairs):
            phase = pairs_done & 1
            # `nought` is 0, which the compiler does not know: else it computes the descriptors of the products before
            # the loop and spills them
            zero = pair & nought
            score = _multiply_keys(q, q_rest, keys, rest, ready, phase, zero, HAS_REST, W)
            score = warpgroup_mma_wait(0, deps=[score])
            if pair == pairs - 1:
                _arrive(q_free)
            first = pair * 128 + W * 64
            if first + 64 > whole:
                slot_N = first + gl.arange(0, 64, gl.SliceLayout(0, SCORES))
                index_N = gl.load(row_indices + slot_N, mask=slot_N < KEYS, other=-1)
                valid_N = (index_N >= 0) & (index_N < key_rows)
                score = gl.where(gl.expand_dims(valid_N, 0), score, float("-inf"))
            block_max_M = gl.max(score, 1) * scale_log2
            if W == 0:
                new_max_M = _raised(max_M, block_max_M)
                p = gl.exp2(score * scale_log2 - gl.expand_dims(new_max_M, 1))
                decay_M = gl.exp2(max_M - new_max_M)
                _publish(p, new_max_M, rest.index(0), max_rows.index(0), p_ready.index(0))
                sum_M = sum_M * decay_M + gl.sum(p, 1)
                left = _rescaled(left, decay_M)
                right = _rescaled(right, decay_M)
                left, right = _multiply_values(_as_operand(p, dtype), keys, left, right, zero, 0, 0)
                left, right = _finish_values(left, right, free, 0, 0)
                mbarrier.wait(p_ready.index(1), phase)
                max_M = max_rows.index(1).load(rows)
                decay_M = gl.exp2(new_max_M - max_M)
                sum_M = sum_M * decay_M
                left = _rescaled(left, decay_M)
                right = _rescaled(right, decay_M)
                fence_async_shared()
                left, right = _multiply_values(rest.index(zero + 1), keys, left, right, zero, 1, 0)
                left, right = _finish_values(left, right, free, 1, 0)
            else:
                mbarrier.wait(p_ready.index(0), phase)
                new_max_M = max_rows.index(0).load(rows)
                decay_M = gl.exp2(max_M - new_max_M)
                sum_M = sum_M * decay_M
                left = _rescaled(left, decay_M)
                right = _rescaled(right, decay_M)
                fence_async_shared()
                left, right = _multiply_values(rest.index(zero), keys, left, right, zero, 0, 1)
                max_M = _raised(new_max_M, block_max_M)
                p = gl.exp2(score * scale_log2 - gl.expand_dims(max_M, 1))
                decay_M = gl.exp2(new_max_M - max_M)
                _publish(p, max_M, rest.index(1), max_rows.index(1), p_ready.index(1))
                sum_M = sum_M * decay_M + gl.sum(p, 1)
                left, right = _finish_values(left, right, free, 0, 1)
                left = _rescaled(left, decay_M)
                right = _rescaled(right, decay_M)
                left, right = _multiply_values(_as_operand(p, dtype), keys, left, right, zero, 1, 1)
                left, right = _finish_values(left, right, free, 1, 1)
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
        row_ptr = out_ptr + (token * HEADS + head) * (4 * QUARTER)
        _store_quarter(row_ptr, 2 * W * QUARTER, left, factor_M, dtype)
        _store_quarter(row_ptr, (2 * W + 1) * QUARTER, right, factor_M, dtype)
        tiles_done += 1  # noqa: SIM113


@gluon.jit
def _allocate(dtype: gl.constexpr, READY: gl.constexpr):
    """(memory, exchange, barriers) of a program; READY: the producer's arrivals for each quarter of a
    block."""
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, QUARTER], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(dtype, [4, 64, QUARTER], wide)
    q_rest = gl.allocate_shared_memory(dtype, [1, 64, 64], narrow)
    keys = gl.allocate_shared_memory(dtype, [8, 64, QUARTER], wide)  # the quarters of block 0, then those of block 1
    rest = gl.allocate_shared_memory(dtype, [2, 64, 64], narrow)
    max_rows = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    sum_rows = gl.allocate_shared_memory(gl.float32, [2, 64], flat)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    ready = gl.allocate_shared_memory(gl.int64, [8, 1], barrier)
    free = gl.allocate_shared_memory(gl.int64, [8, 1], barrier)
    p_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    sum_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(q_ready, count=32 * PRODUCER_WARPS)
    mbarrier.init(q_free, count=2)
    for i in gl.static_range(8):
        mbarrier.init(ready.index(i), count=READY)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(p_ready.index(i), count=1)
        mbarrier.init(sum_ready.index(i), count=1)
    fence_async_shared()
    thread_barrier()

    barriers = (q_ready, q_free, ready, free, p_ready, sum_ready)
    return (q, q_rest, keys, rest), (max_rows, sum_rows), barriers


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
        [216, 80],
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
    span_T3 = torch.empty(tokens, 3, dtype=torch.int32, device=q_THD.device)
    span_kernel[(tokens,)](
        indices_TK, span_T3, kv_SD.shape[0], indices_TK.stride(0), KEYS=keys, KEYS_PADDED=triton.next_power_of_2(keys)
    )
    tiles = tokens * (heads // 64)
    sparse_attention_hopper_kernel[(min(tiles, processors(q_THD.device)),)](
        q_THD,
        kv_SD,
        indices_TK,
        span_T3,
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
