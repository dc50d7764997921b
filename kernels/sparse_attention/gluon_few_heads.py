"""Sparse attention for Hopper in Gluon with up to 16 heads: a shard after tensor parallelism.

A warpgroup product has at least 64 rows, so here the keys are the rows and the heads the columns: S' = K Q' and
O' += V' P'. Nothing is padded but the heads up to 16, and the gather sets the pace. So everything serves the gather:
three blocks of 64 keys fit beside the queries, and a block stays only as long as it must. Four groups of warps hand
each other their work:

    gather:     the latent columns of a block of keys            -> keys (3 blocks)
    companion:  its rope columns, and the queries                -> rest, q
    scores:     S' = K Q', softmax                               -> p, decay (2 blocks)
    values:     O' = O' decay + V' P'; the output

A program takes two neighbouring tokens side by side, a few blocks of the one, then of the other: all programs walk up
the keys together, so a row that comes from device memory serves twice as many tokens before the L2 cache forgets it.
What a token's result is does not depend on its neighbour.

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
    _arrive,
    _block_indices,
    _gather,
    _key_rows,
    span_kernel,
    thread_barrier,
)

TURNED = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))  # [keys or values, heads]
HEAD = gl.constexpr(gl.SliceLayout(0, TURNED))
# [warps, heads]: a thread holds the values of all warps, in the columns of TURNED
PEAKS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[1, 0], [2, 0], [0, 1], [0, 8]],
        lane_bases=[[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]],
        warp_bases=[[0, 0], [0, 0]],
        block_bases=[],
        shape=[4, 16],
    )
)
RING = gl.constexpr(3)  # blocks of keys
# queries on their way, in whole rows and (rope) as in NARROW, are words of two values: single ones take a register each
WIDE_WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))
NARROW_WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
WORDS_IN_MEMORY = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))
PART = 16  # blocks of one token before the other's turn: an even number


@gluon.jit
def _token(tile, which: gl.constexpr, together, tokens, span_ptr):
    """(its blocks of 64 keys, span, stand-in row) of a program's first or second token; no blocks where it has none."""
    token = tile * together + which
    present = (which < together) & (token < tokens)
    token = gl.minimum(token, tokens - 1).to(gl.int64)
    span = gl.load(span_ptr + 3 * token)
    blocks = (gl.maximum(span, -1 - span) + 63) // 64
    return gl.where(present, blocks, 0), span, gl.load(span_ptr + 3 * token + 1)


@gluon.jit
def _tokens(tile, together, tokens, span_ptr):
    """(blocks, blocks, span, span, stand-in, stand-in) of both tokens."""
    blocks0, span0, stand_in0 = _token(tile, 0, together, tokens, span_ptr)
    blocks1, span1, stand_in1 = _token(tile, 1, together, tokens, span_ptr)
    return blocks0, blocks1, span0, span1, stand_in0, stand_in1


@gluon.jit
def _enter(tile, walk, PART: gl.constexpr):
    """A cursor at the first block of the first tile from `tile` on that has any: (tile, block, end of its turn, blocks,
    indices, stand-in row, token) and (block, blocks, indices, stand-in row, token) of the program's other token.
    walk: what every cursor needs, see the kernel."""
    tiles, together, tokens, span_ptr, indices_ptr, indices_stride = walk
    blocks0, blocks1, _span0, _span1, stand_in0, stand_in1 = _tokens(tile, together, tokens, span_ptr)
    while (blocks0 + blocks1 == 0) & (tile < tiles):
        tile += gl.num_programs(0)
        blocks0, blocks1, _span0, _span1, stand_in0, stand_in1 = _tokens(tile, together, tokens, span_ptr)
    token0 = gl.minimum(tile * together, tokens - 1)
    token1 = gl.minimum(tile * together + 1, tokens - 1)
    indices0 = indices_ptr + token0.to(gl.int64) * indices_stride
    indices1 = indices_ptr + token1.to(gl.int64) * indices_stride
    if blocks0 == 0:
        blocks0, blocks1 = blocks1, blocks0
        stand_in0, stand_in1 = stand_in1, stand_in0
        token0, token1 = token1, token0
        indices0, indices1 = indices1, indices0
    end = gl.minimum(blocks0, PART)
    return tile, 0, end, blocks0, indices0, stand_in0, token0, 0, blocks1, indices1, stand_in1, token1


@gluon.jit
def _advance(cursor, walk, PART: gl.constexpr):
    """The cursor one block on: the tokens take turns of PART blocks, as long as both have some."""
    tile, block, end, blocks, indices, stand_in, token, block1, blocks1, indices1, stand_in1, token1 = cursor
    block += 1
    if block == end:
        if block1 < blocks1:
            block, block1 = block1, block
            blocks, blocks1 = blocks1, blocks
            indices, indices1 = indices1, indices
            stand_in, stand_in1 = stand_in1, stand_in
            token, token1 = token1, token
        if block == blocks:
            (
                tile, block, end, blocks, indices, stand_in, token, block1, blocks1, indices1, stand_in1, token1,
            ) = _enter(tile + gl.num_programs(0), walk, PART)  # fmt: skip
        end = gl.minimum(block + PART, blocks)
    return tile, block, end, blocks, indices, stand_in, token, block1, blocks1, indices1, stand_in1, token1


@gluon.jit
def _seek(cursor, walk, KEYS: gl.constexpr, layout: gl.constexpr):
    """(indices of the cursor's block, whether there is one, stand-in row, block, token)."""
    tile, block, _end, _blocks, indices, stand_in, token, _b, _n, _i, _s, _t = cursor
    return _block_indices(indices, block * 64, KEYS, layout), tile < walk[0], stand_in, block, token


@gluon.jit
def _gatherer(memory, barriers, kv_ptr, key_rows, kv_stride, walk, KEYS: gl.constexpr, PART: gl.constexpr):
    keys = memory[2]
    ready = barriers[2]
    free = barriers[3]
    cursor = _enter(gl.program_id(0), walk, PART)
    index_N, live, stand_in, _block, _token = _seek(cursor, walk, KEYS, NARROW)
    slot = 0
    phase = 1
    while live:
        row_N = _key_rows(kv_ptr, index_N, stand_in, key_rows, kv_stride)
        # the indices of the next block travel while this one is gathered
        cursor = _advance(cursor, walk, PART)
        index_N, live, stand_in, _block, _token = _seek(cursor, walk, KEYS, NARROW)
        mbarrier.wait(free.index(slot), phase)
        _gather(keys.index(slot), row_N, 0, 512, NARROW)
        async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)
        slot += 1
        if slot == RING:
            slot = 0
            phase ^= 1


@gluon.jit
def _load_words(rows_M, column: gl.constexpr, WIDTH: gl.constexpr, layout: gl.constexpr):
    column_D = column + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    return gl.load(gl.expand_dims(rows_M.to(gl.pointer_type(gl.int32)), 1) + gl.expand_dims(column_D, 0))


@gluon.jit
def _store_words(destination, words):
    destination._reinterpret(gl.int32, words.shape, WORDS_IN_MEMORY).store(words)


@gluon.jit
def _bring(
    memory, barriers, sought, turn, parts, q_ptr, kv_ptr, key_rows, q_stride_t, q_stride_h, kv_stride,
    HEADS: gl.constexpr, HAS_REST: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """The rope columns of a block, and the queries where its token's turn starts."""
    q, q_rest, _, rest = memory
    q_ready, q_free, _, _, rest_ready, rest_free, _, _, _, _, _, _ = barriers
    index_N, _live, stand_in, block, token = sought
    if block % PART == 0:
        q_row = q_ptr + token.to(gl.int64) * q_stride_t
        head_M = gl.minimum(gl.arange(0, 16, gl.SliceLayout(1, WIDE_WORDS)), HEADS - 1)
        q_tile = _load_words(q_row + head_M * q_stride_h, 0, 256, WIDE_WORDS)
        if HAS_REST:
            head_M = gl.minimum(gl.arange(0, 16, gl.SliceLayout(1, NARROW_WORDS)), HEADS - 1)
            q_rest_tile = _load_words(q_row + head_M * q_stride_h, 256, 32, NARROW_WORDS)
        mbarrier.wait(q_free, (parts & 1) ^ 1)
        _store_words(q.index(0), q_tile)
        if HAS_REST:
            _store_words(q_rest.index(0), q_rest_tile)
        fence_async_shared()
        _arrive(q_ready)
        parts += 1
    if HAS_REST:
        row_N = _key_rows(kv_ptr, index_N, stand_in, key_rows, kv_stride)
        mbarrier.wait(rest_free, (turn & 1) ^ 1)
        _gather(rest.index(0), row_N, 512, 64, NARROW)
        async_copy.mbarrier_arrive(rest_ready.index(block & 1), increment_count=False)
    return parts


@gluon.jit
def _companion(
    memory, barriers, q_ptr, kv_ptr, key_rows, q_stride_t, q_stride_h, kv_stride, walk, KEYS: gl.constexpr,
    HEADS: gl.constexpr, HAS_REST: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    """There is memory for the rope columns of one block only. The indices of the next two travel meanwhile, and take
    turns as `even` and `odd`: moving the one into the other would wait for it."""
    cursor = _enter(gl.program_id(0), walk, PART)
    even = _seek(cursor, walk, KEYS, NARROW)
    cursor = _advance(cursor, walk, PART)
    odd = _seek(cursor, walk, KEYS, NARROW)
    cursor = _advance(cursor, walk, PART)
    turn = 0
    parts = 0
    while even[1]:
        parts = _bring(
            memory, barriers, even, turn, parts, q_ptr, kv_ptr, key_rows, q_stride_t, q_stride_h, kv_stride, HEADS,
            HAS_REST, PART,
        )  # fmt: skip
        even = _seek(cursor, walk, KEYS, NARROW)
        cursor = _advance(cursor, walk, PART)
        if odd[1]:
            parts = _bring(
                memory, barriers, odd, turn + 1, parts, q_ptr, kv_ptr, key_rows, q_stride_t, q_stride_h, kv_stride,
                HEADS, HAS_REST, PART,
            )  # fmt: skip
            odd = _seek(cursor, walk, KEYS, NARROW)
            cursor = _advance(cursor, walk, PART)
        turn += 2


@gluon.jit
def _multiply(memory, barriers, turn, count, nought, HAS_REST: gl.constexpr, W: gl.constexpr):
    """Issues S' = K Q' of a block."""
    q, q_rest, keys, rest = memory
    _, _, ready, _, rest_ready, _, _, _, _, _, _, _ = barriers
    # `nought` is 0, which the compiler does not know: it must not compute all descriptors before the loop
    zero = turn & nought
    slot = turn % RING
    mbarrier.wait(ready.index(slot), (turn // RING) & 1)
    fence_async_shared()
    nothing = gl.zeros([64, 16], gl.float32, TURNED)
    score_NM = warpgroup_mma(keys.index(slot), q.index(zero).permute((1, 0)), nothing, use_acc=False, is_async=True)
    if HAS_REST:
        mbarrier.wait(rest_ready.index(W), count & 1)
        fence_async_shared()
        score_NM = warpgroup_mma(rest.index(zero), q_rest.index(zero).permute((1, 0)), score_NM, is_async=True)
    return score_NM


@gluon.jit
def _highest(score_NM, peaks):
    """The maximum of each column: of a warp by shuffles, of the four by one exchange (a plain gl.max takes two)."""
    peak_WM = gl.max(gl.reshape(score_NM, [4, 16, 16]), 1)
    peaks.store(peak_WM)
    thread_barrier()
    return gl.convert_layout(gl.max(peaks.load(PEAKS), 0), HEAD)


@gluon.jit
def _total(sum_NM, peaks):
    """The sum of each column, likewise."""
    sum_WM = gl.sum(gl.reshape(sum_NM, [4, 16, 16]), 1)
    thread_barrier()  # what was exchanged before has been read
    peaks.store(sum_WM)
    thread_barrier()
    return gl.convert_layout(gl.sum(peaks.load(PEAKS), 0), HEAD)


@gluon.jit
def _score_part(
    memory, exchange, barriers, row_indices, token_maxima, own_max_M, sum_NM, first, last, turn, count, other_count,
    parts, key_rows, scale_log2, nought, KEYS: gl.constexpr, HAS_REST: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """The even (W = 0) or odd blocks of a token's turn. The sum is of this group's blocks and relative to `own_max_M`;
    from `token_maxima` on are the token's maxima after its even and after its odd blocks. count, other_count: blocks
    that this group and the other have had."""
    p_tiles, decays, _, peaks, finals = exchange
    maxima = finals[0]
    q_ready, q_free, _, _, _, rest_free, p_ready, p_free, _, _, _, _ = barriers
    if first < last:
        mbarrier.wait(q_ready, parts & 1)
        # each group sees every phase of the other's barrier before the next can end, or its wait would not return; the
        # odd one has seen the even one's last block, see below
        if (other_count > 0) & (W == 0):
            mbarrier.wait(p_ready.index(1), (other_count - 1) & 1)
        for block in range(first + W, last, 2):  # turns start at even blocks
            slot_N = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, TURNED))
            index_N = gl.load(row_indices + slot_N, mask=slot_N < KEYS, other=-1)
            pending = _multiply(memory, barriers, turn + block - first, count, nought, HAS_REST, W)
            score_NM = warpgroup_mma_wait(0, deps=[pending])
            thread_barrier()
            if HAS_REST:
                mbarrier.arrive(rest_free, count=1)
            valid_N = (index_N >= 0) & (index_N < key_rows)
            score_NM = gl.where(gl.expand_dims(valid_N, 1), score_NM * scale_log2, float("-inf"))
            block_max_M = _highest(score_NM, peaks.index(W))
            if block > first:  # the maximum before this block is the other group's
                mbarrier.wait(p_ready.index(1 - W), (other_count + ((block - 1 - first) >> 1)) & 1)
            old_max_M = gl.where(block == 0, -1e30, maxima.index(token_maxima + (1 - W)).load(HEAD))
            max_M = gl.maximum(old_max_M, block_max_M)
            maxima.index(token_maxima + W).store(max_M)
            p_NM = gl.exp2(score_NM - gl.expand_dims(max_M, 0))
            mbarrier.wait(p_free.index(W), (count & 1) ^ 1)
            p_tiles.index(W).store(p_NM.to(memory[2].dtype))
            decays.index(W).store(gl.exp2(old_max_M - max_M))
            fence_async_shared()
            _arrive(p_ready.index(W))
            sum_NM = sum_NM * gl.expand_dims(gl.exp2(own_max_M - max_M), 0) + p_NM  # of the keys that a thread holds
            own_max_M = max_M
            count += 1
        other_count += (last - first + W) >> 1
        if ((last - first) & W) == 1:  # of an odd number of blocks the last is the even group's
            mbarrier.wait(p_ready.index(0), (other_count - 1) & 1)
        _arrive(q_free)
        parts += 1
        turn += last - first
    return own_max_M, sum_NM, turn, count, other_count, parts


@gluon.jit
def _last_max(maxima, token_maxima, blocks):
    return gl.where(blocks == 0, -1e30, maxima.index(token_maxima + ((blocks & 1) ^ 1)).load(HEAD))


@gluon.jit
def _finish(token, present, span, max_M, sum_M, lse_ptr, sink_ptr, HEADS: gl.constexpr, HAS_SINK: gl.constexpr):
    """Stores the lse; what the output is to be multiplied by."""
    head_M = gl.arange(0, 16, HEAD)
    real_M = (head_M < HEADS) & present
    empty_M = sum_M == 0.0
    sum_M = gl.where(empty_M, 1.0, sum_M)
    lse_M = gl.where(empty_M, float("-inf"), (max_M + gl.log2(sum_M)) * 0.6931471805599453)
    factor_M = gl.where(empty_M, 0.0, 1.0 / sum_M)
    if HAS_SINK:
        sink_M = gl.load(sink_ptr + head_M, mask=real_M, other=0.0)
        factor_M = gl.where(empty_M, 0.0, factor_M / (1.0 + gl.exp(sink_M - lse_M)))
    if span < 0:
        factor_M = gl.full([16], float("nan"), gl.float32, HEAD)
        lse_M = gl.full([16], float("nan"), gl.float32, HEAD)
    gl.store(lse_ptr + token * HEADS + head_M, lse_M, mask=real_M)
    return factor_M


@gluon.jit
def _scorer(
    memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, lse_ptr, tokens, tiles, together, key_rows,
    scale_log2, indices_stride, nought, KEYS: gl.constexpr, HEADS: gl.constexpr, HAS_REST: gl.constexpr,
    HAS_SINK: gl.constexpr, PART: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    factors = exchange[2]
    peaks = exchange[3]
    maxima = exchange[4][0]
    sums = exchange[4][1]
    p_ready = barriers[6]
    done_ready = barriers[8]
    done_free = barriers[9]
    sum_ready = barriers[10]
    sum_free = barriers[11]
    turn = 0
    count = 0
    other_count = 0
    parts = 0
    tiles_done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        blocks0, blocks1, span0, span1, _stand_in0, _stand_in1 = _tokens(tile, together, tokens, span_ptr)
        token0 = (tile * together).to(gl.int64)
        token1 = gl.minimum(token0 + 1, tokens - 1)
        maxima0 = (tiles_done & 1) * 4
        maxima1 = maxima0 + 2
        max0_M = gl.full([16], -1e30, gl.float32, HEAD)  # finite: no inf - inf where nothing is selected
        max1_M = gl.full([16], -1e30, gl.float32, HEAD)
        sum0_NM = gl.zeros([64, 16], gl.float32, TURNED)
        sum1_NM = gl.zeros([64, 16], gl.float32, TURNED)
        for first in range(0, gl.maximum(blocks0, blocks1), PART):
            max0_M, sum0_NM, turn, count, other_count, parts = _score_part(
                memory, exchange, barriers, indices_ptr + token0 * indices_stride, maxima0, max0_M, sum0_NM, first,
                gl.minimum(first + PART, blocks0), turn, count, other_count, parts, key_rows, scale_log2, nought, KEYS,
                HAS_REST, W,
            )  # fmt: skip
            max1_M, sum1_NM, turn, count, other_count, parts = _score_part(
                memory, exchange, barriers, indices_ptr + token1 * indices_stride, maxima1, max1_M, sum1_NM, first,
                gl.minimum(first + PART, blocks1), turn, count, other_count, parts, key_rows, scale_log2, nought, KEYS,
                HAS_REST, W,
            )  # fmt: skip
        if (other_count > 0) & (W == 0):
            mbarrier.wait(p_ready.index(1), (other_count - 1) & 1)  # the last maxima are there
        last0_M = _last_max(maxima, maxima0, blocks0)
        last1_M = _last_max(maxima, maxima1, blocks1)
        sum0_M = _total(sum0_NM, peaks.index(W)) * gl.exp2(max0_M - last0_M)
        sum1_M = _total(sum1_NM, peaks.index(W)) * gl.exp2(max1_M - last1_M)
        if W == 1:
            mbarrier.wait(sum_free, (tiles_done & 1) ^ 1)
            sums.index(0).store(sum0_M)
            sums.index(1).store(sum1_M)
            _arrive(sum_ready)
        else:
            mbarrier.wait(sum_ready, tiles_done & 1)
            sum0_M += sums.index(0).load(HEAD)
            sum1_M += sums.index(1).load(HEAD)
            _arrive(sum_free)
            factor0_M = _finish(token0, True, span0, last0_M, sum0_M, lse_ptr, sink_ptr, HEADS, HAS_SINK)
            present1 = (together > 1) & (token0 + 1 < tokens)
            factor1_M = _finish(token1, present1, span1, last1_M, sum1_M, lse_ptr, sink_ptr, HEADS, HAS_SINK)
            mbarrier.wait(done_free, (tiles_done & 1) ^ 1)
            factors.index(0).store(factor0_M)
            factors.index(1).store(factor1_M)
            _arrive(done_ready)
        tiles_done += 1  # noqa: SIM113


@gluon.jit
def _value_part(memory, exchange, barriers, acc_VM, first, last, turn, evens, odds):
    keys = memory[2]
    p_tiles, decays, _, _, _ = exchange
    _, _, ready, free, _, _, p_ready, p_free, _, _, _, _ = barriers
    for block in range(first, last):
        slot = turn % RING
        which = block & 1
        mbarrier.wait(p_ready.index(which), gl.where(which == 0, evens, odds) & 1)
        mbarrier.wait(ready.index(slot), (turn // RING) & 1)  # they are: the memory model asks for it
        decay_M = decays.index(which).load(HEAD)
        fence_async_shared()
        acc_VM = warpgroup_mma(
            keys.index(slot).permute((1, 0)), p_tiles.index(which), acc_VM * gl.expand_dims(decay_M, 0), is_async=True
        )
        acc_VM = warpgroup_mma_wait(0, deps=[acc_VM])
        thread_barrier()
        mbarrier.arrive(free.index(slot), count=1)
        mbarrier.arrive(p_free.index(which), count=1)
        turn += 1
        evens += 1 - which
        odds += which
    return acc_VM, turn, evens, odds


@gluon.jit
def _store(out_ptr, token, present, acc_VM, factor_M, HEADS: gl.constexpr, dtype: gl.constexpr):
    head_M = gl.arange(0, 16, HEAD)
    value_V = gl.arange(0, 512, gl.SliceLayout(1, TURNED))
    row_M = out_ptr + (token * HEADS + head_M) * 512
    pointers = gl.expand_dims(row_M, 0) + gl.expand_dims(value_V, 1)
    real_M = (head_M < HEADS) & present
    gl.store(pointers, (acc_VM * gl.expand_dims(factor_M, 0)).to(dtype), mask=gl.expand_dims(real_M, 0))


@gluon.jit
def _valuer(
    memory, exchange, barriers, span_ptr, out_ptr, tokens, tiles, together, HEADS: gl.constexpr, PART: gl.constexpr
):
    factors = exchange[2]
    done_ready = barriers[8]
    done_free = barriers[9]
    dtype: gl.constexpr = memory[2].dtype
    turn = 0
    evens = 0
    odds = 0
    tiles_done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        blocks0, blocks1, _span0, _span1, _stand_in0, _stand_in1 = _tokens(tile, together, tokens, span_ptr)
        acc0_VM = gl.zeros([512, 16], gl.float32, TURNED)
        acc1_VM = gl.zeros([512, 16], gl.float32, TURNED)
        for first in range(0, gl.maximum(blocks0, blocks1), PART):
            acc0_VM, turn, evens, odds = _value_part(
                memory, exchange, barriers, acc0_VM, first, gl.minimum(first + PART, blocks0), turn, evens, odds
            )
            acc1_VM, turn, evens, odds = _value_part(
                memory, exchange, barriers, acc1_VM, first, gl.minimum(first + PART, blocks1), turn, evens, odds
            )
        mbarrier.wait(done_ready, tiles_done & 1)
        factor0_M = factors.index(0).load(HEAD)
        factor1_M = factors.index(1).load(HEAD)
        _arrive(done_free)
        token0 = (tile * together).to(gl.int64)
        _store(out_ptr, token0, True, acc0_VM, factor0_M, HEADS, dtype)
        _store(out_ptr, token0 + 1, (together > 1) & (token0 + 1 < tokens), acc1_VM, factor1_M, HEADS, dtype)
        tiles_done += 1  # noqa: SIM113


@gluon.jit
def sparse_attention_few_heads_kernel(
    q_ptr, kv_ptr, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tokens, tiles, together, key_rows, scale_log2,
    q_stride_t, q_stride_h, kv_stride, indices_stride, nought, KEYS: gl.constexpr, HEADS: gl.constexpr,
    HAS_REST: gl.constexpr, HAS_SINK: gl.constexpr, PART: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_ptr.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 512], dtype)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(dtype, [1, 16, 512], gl.NVMMASharedLayout.get_default_for([16, 512], dtype))
    q_rest = gl.allocate_shared_memory(dtype, [1, 16, 64], gl.NVMMASharedLayout.get_default_for([16, 64], dtype))
    keys = gl.allocate_shared_memory(dtype, [RING, 64, 512], wide)
    rest = gl.allocate_shared_memory(dtype, [1, 64, 64], narrow)
    p_tiles = gl.allocate_shared_memory(dtype, [2, 64, 16], gl.NVMMASharedLayout.get_default_for([64, 16], dtype))
    decays = gl.allocate_shared_memory(gl.float32, [2, 16], flat)
    factors = gl.allocate_shared_memory(gl.float32, [2, 16], flat)
    maxima = gl.allocate_shared_memory(gl.float32, [8, 16], flat)
    sums = gl.allocate_shared_memory(gl.float32, [2, 16], flat)
    peaks = gl.allocate_shared_memory(gl.float32, [2, 4, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    q_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    ready = gl.allocate_shared_memory(gl.int64, [RING, 1], barrier)
    free = gl.allocate_shared_memory(gl.int64, [RING, 1], barrier)
    rest_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)  # one for each group of scores
    rest_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    p_ready = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    p_free = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    done_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    done_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    sum_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    sum_free = gl.allocate_shared_memory(gl.int64, [1], barrier)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=2)
    mbarrier.init(sum_ready, count=1)
    mbarrier.init(sum_free, count=1)
    mbarrier.init(rest_free, count=1)
    mbarrier.init(done_ready, count=1)
    mbarrier.init(done_free, count=1)
    for i in gl.static_range(RING):
        mbarrier.init(ready.index(i), count=128)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(rest_ready.index(i), count=128)
        mbarrier.init(p_ready.index(i), count=1)
        mbarrier.init(p_free.index(i), count=1)
    fence_async_shared()
    thread_barrier()

    memory = (q, q_rest, keys, rest)
    exchange = (p_tiles, decays, factors, peaks, (maxima, sums))
    barriers = (
        q_ready, q_free, ready, free, rest_ready, rest_free, p_ready, p_free, done_ready, done_free, sum_ready,
        sum_free,
    )  # fmt: skip
    walk = (tiles, together, tokens, span_ptr, indices_ptr, indices_stride)
    gl.warp_specialize(
        [
            (_scorer, (
                memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, lse_ptr, tokens, tiles, together,
                key_rows, scale_log2, indices_stride, nought, KEYS, HEADS, HAS_REST, HAS_SINK, PART, gl.constexpr(0),
            )),
            (_scorer, (
                memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, lse_ptr, tokens, tiles, together,
                key_rows, scale_log2, indices_stride, nought, KEYS, HEADS, HAS_REST, HAS_SINK, PART, gl.constexpr(1),
            )),
            (_valuer, (memory, exchange, barriers, span_ptr, out_ptr, tokens, tiles, together, HEADS, PART)),
            (_gatherer, (memory, barriers, kv_ptr, key_rows, kv_stride, walk, KEYS, PART)),
            (_companion, (
                memory, barriers, q_ptr, kv_ptr, key_rows, q_stride_t, q_stride_h, kv_stride, walk, KEYS, HEADS,
                HAS_REST, PART,
            )),
        ],
        [4, 4, 4, 4],
        [88, 160, 40, 104],
    )  # fmt: skip


def supports(heads: int, dim: int, value_dim: int, dtype: torch.dtype, target: tuple[int, int]) -> bool:
    shapes = dim in (512, 576) and value_dim == 512 and 0 < heads <= 16
    return target == (9, 0) and shapes and dtype in (torch.bfloat16, torch.float16)


def sparse_attention(
    q_THD: torch.Tensor,
    kv_SD: torch.Tensor,
    indices_TK: torch.Tensor,
    scale: float,
    sink_H: torch.Tensor | None = None,
    part: int = PART,
    together: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel where `supports` says so. Arguments are checked by the caller; see the package."""
    (tokens, heads, dim), keys = q_THD.shape, indices_TK.shape[1]
    out_THV = q_THD.new_empty(tokens, heads, 512)
    lse_TH = q_THD.new_empty(tokens, heads, dtype=torch.float32)
    span_T3 = torch.empty(tokens, 3, dtype=torch.int32, device=q_THD.device)
    span_kernel[(tokens,)](
        indices_TK, span_T3, kv_SD.shape[0], indices_TK.stride(0), KEYS=keys, KEYS_PADDED=triton.next_power_of_2(keys)
    )
    programs = processors(q_THD.device)
    together = together or (2 if tokens >= 2 * programs else 1)
    tiles = triton.cdiv(tokens, together)
    sparse_attention_few_heads_kernel[(min(tiles, programs),)](
        q_THD,
        kv_SD,
        indices_TK,
        span_T3,
        sink_H,
        out_THV,
        lse_TH,
        tokens,
        tiles,
        together,
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
        PART=part,
        num_warps=4,
    )
    return out_THV, lse_TH
