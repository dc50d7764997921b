"""Indexer scores for Hopper in Gluon, 64 heads of 128: all of them, or those above a threshold of their query.

Two consumer warpgroups hold four queries each and walk the same tiles of 64 keys, half a tile apart or so: the tensor
cores multiply for the one while the other takes ReLU and the sum over heads. A producer warp has the copy engine bring
the tiles. What limits it then is the card's power.

Each of a warpgroup's four warps has a quarter of the keys of its own: row 16 w + r of a tile is key r of the tile's
sixteen in quarter w. So a warp sees its keys in ascending order, and can append those above the threshold to a list of
its own without a word to the others: the four lists of a query, one behind the other, are in the order of the keys.

The sum over heads of e4m3 queries is a product as well: ReLU rounds to bf16 on its way (64 instructions instead of 256)
into a product with the weights, which are two bf16, high and low, in two columns. That adds 2e-3 to the error of the
scores, where e4m3 itself is good for 3e-2; wider queries are summed in fp32.

Where only what passes a threshold is kept, a tile's product is issued before the scores of the one before are appended,
and the groups' products of e4m3 wait for each other: else both multiply, and then both add up, at the same time.

Legend: T query tokens, S keys, H = 64 heads, D = 128; B = 4 queries of a warpgroup, N = 256 their (query, head)
columns, M = 64 keys of a tile, C slots of a list.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    mma_v2,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.indexer_scores.triton import aligned

thread_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # Triton 3.6, 3.7
B = gl.constexpr(4)
HEADS = gl.constexpr(64)
QUERIES = 8  # of a program
LISTS = 4  # of a query
FILLED = gl.constexpr(512)  # keys that are filled with -inf at once
# [keys, queries]: lane l of a warp holds rows l // 4 and l // 4 + 8 of query l % 4
SCORES = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
KEY = gl.constexpr(gl.SliceLayout(1, SCORES))
QUERY = gl.constexpr(gl.SliceLayout(0, SCORES))
# what each lane of a row sums by itself: [keys, queries, lanes]
PARTS = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0, 0], [0, 1, 0], [0, 2, 0]],
        lane_bases=[[0, 0, 1], [0, 0, 2], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 4, 4],
    )
)
# the same as [keys, lanes, queries], the queries of a key side by side in a thread
EXCHANGED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [8, 0, 0]],
        lane_bases=[[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        warp_bases=[[16, 0, 0], [32, 0, 0]],
        block_bases=[],
        shape=[64, 4, 4],
    )
)
SUMS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8]))
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
ONE_WARP = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))


@gluon.jit
def _ranges(start_ptr, end_ptr, token, tokens, keys, PERIOD: gl.constexpr, COUNT: gl.constexpr, layout: gl.constexpr):
    """The key range of each of COUNT queries, cut to the keys; in sampled keys, each the middle one of PERIOD."""
    query_Q = token + gl.arange(0, COUNT, layout)
    present_Q = query_Q < tokens
    end_Q = gl.load(end_ptr + query_Q, mask=present_Q, other=0).to(gl.int32)
    start_Q = gl.maximum(gl.load(start_ptr + query_Q, mask=present_Q, other=2147483000).to(gl.int32), 0)
    start_Q = (start_Q + (PERIOD - 1) // 2) // PERIOD
    end_Q = gl.minimum((gl.maximum(end_Q, 0) + (PERIOD - 1) // 2) // PERIOD, keys)
    return start_Q, end_Q


@gluon.jit
def _walk(start_ptr, end_ptr, chosen_ptr, tokens, keys, PERIOD: gl.constexpr, layout: gl.constexpr):
    """(first query, first key, key behind the last, tiles) of a program."""
    # the last queries see the most keys in a causal batch: they go first
    token = (gl.num_programs(0) - 1 - gl.program_id(0)) * (2 * B)
    start_Q, end_Q = _ranges(start_ptr, end_ptr, token, tokens, keys, PERIOD, 2 * B, layout)
    low = gl.minimum(gl.min(start_Q, 0), keys) // 16 * 16
    high = gl.maximum(gl.max(end_Q, 0), low)
    if chosen_ptr is not None:
        query_Q = token + gl.arange(0, 2 * B, layout)
        any_chosen = gl.max(gl.load(chosen_ptr + query_Q, mask=query_Q < tokens, other=0), 0)
        high = gl.where(any_chosen > 0, high, low)
    part = ((high - low + gl.num_programs(1) - 1) // gl.num_programs(1) + 63) // 64 * 64
    low = gl.minimum(low + gl.program_id(1) * part, high)
    high = gl.minimum(low + part, high)
    return token, low, high, (high - low + 63) // 64


@gluon.jit
def _producer(
    q_tiles, k_tiles, q, k_quarters, barriers, start_ptr, end_ptr, chosen_ptr, tokens, keys, PERIOD: gl.constexpr,
    STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    q_ready, ready, free, _ = barriers
    WIDTH: gl.constexpr = k_tiles.block_shape[1]
    PARTS_OF_D: gl.constexpr = q.shape[0] // 2
    token, low, _high, tiles = _walk(start_ptr, end_ptr, chosen_ptr, tokens, keys, PERIOD, ONE_WARP)
    if tiles > 0:
        mbarrier.expect(q_ready, 2 * B * HEADS * 128 * PARTS_OF_D)
        for group in gl.static_range(2):
            for part in gl.static_range(PARTS_OF_D):
                q_place = q.index(group * PARTS_OF_D + part)
                tma.async_copy_global_to_shared(q_tiles, [(token + group * B) * HEADS, part * WIDTH], q_ready, q_place)
    slot = 0
    phase = 1
    for tile in range(gl.where(tiles > 0, tiles + EARLY, 0)):  # past the last keys: zeros, or other keys
        mbarrier.wait(free.index(slot), phase)
        mbarrier.expect(ready.index(slot), 64 * 128 * PARTS_OF_D)
        for part in gl.static_range(PARTS_OF_D):
            for quarter in gl.static_range(4):
                row = low + (quarter * tiles + tile) * 16
                place = k_quarters.index((slot * PARTS_OF_D + part) * 4 + quarter)
                tma.async_copy_global_to_shared(k_tiles, [row, part * WIDTH], ready.index(slot), place)
        slot += 1
        if slot == STAGES:
            slot = 0
            phase ^= 1


@gluon.jit
def _weights(weight_ptr, q_scale_ptr, token, tokens, layout: gl.constexpr):
    """[N] head weights, times the query scales where there are any."""
    column_N = gl.arange(0, B * HEADS, layout)
    inside_N = token + column_N // HEADS < tokens
    offset_N = token.to(gl.int64) * HEADS + column_N
    weight_N = gl.load(weight_ptr + offset_N, mask=inside_N, other=0.0).to(gl.float32)
    if q_scale_ptr is not None:
        weight_N *= gl.load(q_scale_ptr + offset_N, mask=inside_N, other=0.0)
    return weight_N


@gluon.jit
def _weight_columns(weight_N):
    """[N, 8] bf16: column 2 b holds the weights of query b where its heads are, else 0; 2 b + 1 what bf16 left over."""
    layout: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    weight_N = gl.convert_layout(weight_N, gl.SliceLayout(1, layout))
    high_N = weight_N.to(gl.bfloat16)
    low_N = (weight_N - high_N.to(gl.float32)).to(gl.bfloat16)
    query_N = gl.arange(0, B * HEADS, gl.SliceLayout(1, layout)) // HEADS
    column_U = gl.arange(0, 8, gl.SliceLayout(0, layout))
    value = gl.where(gl.expand_dims(column_U % 2 == 0, 0), gl.expand_dims(high_N, 1), gl.expand_dims(low_N, 1))
    own = gl.expand_dims(query_N, 1) == gl.expand_dims(column_U // 2, 0)
    return gl.where(own, value, gl.zeros([B * HEADS, 8], gl.bfloat16, layout))


@gluon.jit
def _sum_by_product(product_MN, weight_NU):
    relu_MN = gl.inline_asm_elementwise(
        "cvt.rn.relu.bf16x2.f32 $0, $2, $1;", "=r,r,r", [product_MN], dtype=gl.bfloat16, is_pure=True, pack=2
    )
    relu_MN = gl.convert_layout(relu_MN, gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)
    sum_MU = mma_v2(relu_MN, weight_NU, gl.zeros([64, 8], gl.float32, SUMS))
    return gl.convert_layout(gl.sum(gl.reshape(sum_MU, [64, B, 2]), 2), SCORES, assert_trivial=True)


@gluon.jit
def _either(a, b):
    return b


def _chain() -> str:
    """Assembly: the 16 values that a thread has of a query in each of rows r and r + 8 (by turns of two), ReLU, times
    their weights, added up one after the other."""
    lines = [".reg .f32 value, sum0, sum2;"]
    for i in range(32):
        total = f"sum{i & 2}"
        lines.append(f"max.f32 value, ${32 + i}, 0f00000000;")
        if i in (0, 2):
            lines.append(f"mul.rn.f32 {total}, value, ${64 + i};")
        else:
            lines.append(f"fma.rn.f32 {total}, value, ${64 + i}, {total};")
    lines += [f"mov.f32 ${i}, sum{i & 2};" for i in range(32)]
    return "{\n" + "\n".join(lines) + "\n}"


CHAIN = gl.constexpr(_chain())
CHAINED = gl.constexpr(",".join(["=&f"] * 32 + ["f"] * 64))


@gluon.jit
def _parts(product_MN, weight_N):
    """[keys, queries, lanes]: each lane's share of the sum over heads. By hand, since the compiler chooses for each
    element anew which of two products it rounds before they are added: equal keys would get different scores."""
    sums_MN = gl.inline_asm_elementwise(
        CHAIN, CHAINED, [product_MN, gl.expand_dims(weight_N, 0)], dtype=gl.float32, is_pure=True, pack=32
    )
    return gl.reduce(gl.reduce(gl.reshape(sums_MN, [64, B, 8, 4, 2]), 4, _either), 2, _either)


@gluon.jit
def _sum_by_lanes(product_MN, weight_N):
    part = gl.convert_layout(_parts(product_MN, weight_N), PARTS)
    return gl.convert_layout(gl.sum(part, 2), SCORES)


@gluon.jit
def _sum_by_exchange(product_MN, weight_N):
    """The same bits: lane l of a row gets query l from the others by three exchanges, where four sums over the lanes
    take eight, and another two through shared memory to spread them."""
    part = gl.convert_layout(gl.permute(_parts(product_MN, weight_N), (0, 2, 1)), EXCHANGED)
    lane = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, EXCHANGED)))
    lane = gl.expand_dims(gl.expand_dims(lane, 0), 2) + gl.zeros([64, 4, B], gl.int32, EXCHANGED)
    total = gl.inline_asm_elementwise(
        """
        {
        .reg .pred odd, upper;
        .reg .b32 bit;
        .reg .f32 give0, give1, keep0, keep1;
        and.b32 bit, $8, 1;
        setp.ne.s32 odd, bit, 0;
        and.b32 bit, $8, 2;
        setp.ne.s32 upper, bit, 0;
        selp.f32 give0, $4, $6, upper;
        selp.f32 keep0, $6, $4, upper;
        selp.f32 give1, $5, $7, upper;
        selp.f32 keep1, $7, $5, upper;
        shfl.sync.bfly.b32 give0, give0, 2, 0x1f, 0xffffffff;
        shfl.sync.bfly.b32 give1, give1, 2, 0x1f, 0xffffffff;
        add.f32 keep0, keep0, give0;
        add.f32 keep1, keep1, give1;
        selp.f32 give0, keep0, keep1, odd;
        selp.f32 keep0, keep1, keep0, odd;
        shfl.sync.bfly.b32 give0, give0, 1, 0x1f, 0xffffffff;
        add.f32 keep0, keep0, give0;
        mov.f32 $0, keep0;
        mov.f32 $1, keep0;
        mov.f32 $2, keep0;
        mov.f32 $3, keep0;
        }
        """,
        "=f,=f,=f,=f,f,f,f,f,r,r,r,r",
        [part, lane],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )
    return gl.convert_layout(gl.max(total, 2), SCORES, assert_trivial=True)


@gluon.jit
def _append(list_MB, count_MB, score_MB, key_MB, chosen_MB, lanes_MB, slots_MB):
    """Appends a warp's chosen (key, score) to its list of each query, rows in order; returns the new counts, which go
    on past the `slots` of a list where nothing is stored any more. lanes: those that hold the same query."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred p0, p1;
        .reg .b32 m0, m1, n0, n1, c0, c1, below;
        .reg .b64 a0, a1;
        setp.ne.s32 p0, $10, 0;
        setp.ne.s32 p1, $11, 0;
        vote.sync.ballot.b32 m0, p0, 0xffffffff;
        vote.sync.ballot.b32 m1, p1, 0xffffffff;
        and.b32 m0, m0, $12;
        and.b32 m1, m1, $12;
        mov.u32 below, %lanemask_lt;
        and.b32 n0, m0, below;
        and.b32 n1, m1, below;
        popc.b32 n0, n0;
        popc.b32 n1, n1;
        popc.b32 c0, m0;
        popc.b32 c1, m1;
        add.s32 n0, n0, $4;
        add.s32 c0, c0, $4;
        add.s32 n1, n1, c0;
        add.s32 $0, c0, c1;
        mov.b32 $1, $0;
        setp.lt.and.s32 p0, n0, $14, p0;
        setp.lt.and.s32 p1, n1, $14, p1;
        mad.wide.s32 a0, n0, 8, $2;
        mad.wide.s32 a1, n1, 8, $2;
        @p0 st.global.v2.b32 [a0], {$8, $6};
        @p1 st.global.v2.b32 [a1], {$9, $7};
        }
        """,
        "=r,=r,l,l,r,r,r,r,r,r,r,r,r,r,r,r",
        [list_MB, count_MB, score_MB.to(gl.int32, bitcast=True), key_MB, chosen_MB.to(gl.int32), lanes_MB, slots_MB],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def _fill(row_ptr, begin, end):
    for first in range(begin, end, FILLED):
        key_F = first + gl.arange(0, FILLED, LINE)
        gl.store(row_ptr + key_F, gl.full([FILLED], float("-inf"), gl.float32, LINE), mask=key_F < end)


@gluon.jit
def _multiply(q, k, ready, turn, product_MN, slot, phase, tile, zero, IN_TURN: gl.constexpr, G: gl.constexpr):
    """Issues the product of a tile of keys. zero: is 0, which the compiler does not know: it must not compute all
    descriptors before the loop."""
    PARTS_OF_D: gl.constexpr = q.shape[0] // 2
    mbarrier.wait(ready.index(slot), phase)
    if IN_TURN:
        mbarrier.wait(turn.index(G), (tile & 1) ^ (1 - G))
    for part in gl.static_range(PARTS_OF_D):
        product_MN = warpgroup_mma(
            k.index(slot * PARTS_OF_D + part), q.index(zero + G * PARTS_OF_D + part).permute((1, 0)), product_MN,
            use_acc=part > 0, is_async=True,
        )  # fmt: skip
    return product_MN


@gluon.jit
def _consumer(
    q, k, barriers, weight_ptr, q_scale_ptr, k_scale_ptr, start_ptr, end_ptr, chosen_ptr, threshold_ptr, out_ptr,
    count_ptr, tokens, keys, out_stride, nought, PERIOD: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
    FILL: gl.constexpr, EARLY: gl.constexpr, IN_TURN: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    q_ready, ready, free, turn = barriers
    dtype: gl.constexpr = k.dtype
    NARROW: gl.constexpr = dtype.primitive_bitwidth == 8
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, B * HEADS, 256 // dtype.primitive_bitwidth])
    token, low, high, tiles = _walk(start_ptr, end_ptr, chosen_ptr, tokens, keys, PERIOD, LINE)
    token += G * B
    start_B, end_B = _ranges(start_ptr, end_ptr, token, tokens, keys, PERIOD, B, QUERY)
    query_B = token + gl.arange(0, B, QUERY)
    row_M = gl.arange(0, 64, KEY)
    quarter_M = row_M // 16
    key_M = low + quarter_M * (tiles * 16) + row_M % 16
    weight_N = _weights(weight_ptr, q_scale_ptr, token, tokens, gl.SliceLayout(0, PRODUCT))
    if NARROW:
        weight_NU = _weight_columns(weight_N)
    list_MB = gl.expand_dims(query_B, 0) * 4 + gl.expand_dims(quarter_M, 1)
    count_MB = gl.zeros([64, B], gl.int32, SCORES)
    if threshold_ptr is not None:
        threshold_B = gl.load(threshold_ptr + query_B, mask=query_B < tokens, other=0.0)
        lanes_MB = count_MB + (0x11111111 << gl.expand_dims(gl.arange(0, B, QUERY), 0))
        slots_MB = count_MB + SLOTS
        list_ptr_MB = (out_ptr + list_MB.to(gl.int64) * SLOTS).to(gl.int64)
    else:
        row_ptr_B = out_ptr + query_B.to(gl.int64) * out_stride
    if tiles > 0:
        mbarrier.wait(q_ready, 0)
        product_MN = gl.zeros([64, B * HEADS], gl.float32, PRODUCT)
        if EARLY:
            product_MN = _multiply(q, k, ready, turn, product_MN, 0, 0, 0, nought, IN_TURN, G)
        slot = 0
        phase = 0
        for tile in range(tiles):
            if k_scale_ptr is not None:
                scale_M = gl.load(k_scale_ptr + gl.minimum(key_M, keys - 1) * PERIOD + PERIOD // 2)
            if not EARLY:
                product_MN = _multiply(q, k, ready, turn, product_MN, slot, phase, tile, tile & nought, IN_TURN, G)
            product_MN = warpgroup_mma_wait(0, deps=[product_MN])
            thread_barrier()
            if IN_TURN:
                mbarrier.arrive(turn.index(1 - G), count=1)
            mbarrier.arrive(free.index(slot), count=1)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
            if NARROW:
                score_MB = _sum_by_product(product_MN, weight_NU)
            elif EARLY:
                score_MB = _sum_by_exchange(product_MN, weight_N)
            else:
                score_MB = _sum_by_lanes(product_MN, weight_N)
            if EARLY:
                product_MN = _multiply(q, k, ready, turn, product_MN, slot, phase, tile + 1, tile & nought, IN_TURN, G)
            if k_scale_ptr is not None:
                score_MB *= gl.expand_dims(scale_M, 1)
            key_MB = gl.expand_dims(key_M, 1) + gl.zeros([64, B], gl.int32, SCORES)
            seen_MB = (key_MB >= gl.expand_dims(start_B, 0)) & (key_MB < gl.expand_dims(end_B, 0))
            if threshold_ptr is not None:
                chosen_MB = seen_MB & (score_MB > gl.expand_dims(threshold_B, 0))
                count_MB = _append(list_ptr_MB, count_MB, score_MB, key_MB, chosen_MB, lanes_MB, slots_MB)
            else:
                score_MB = gl.where(seen_MB, score_MB, float("-inf"))
                inside_MB = (key_MB < high) & gl.expand_dims(query_B < tokens, 0)
                gl.store(gl.expand_dims(row_ptr_B, 0) + key_MB, score_MB, mask=inside_MB)
            key_M += 16
        if EARLY:
            warpgroup_mma_wait(0, deps=[product_MN])
            thread_barrier()
            mbarrier.arrive(turn.index(1 - G), count=1)  # for the other group's product that nobody needs
    if threshold_ptr is not None:
        once_MB = gl.expand_dims(row_M % 16 == 0, 1) & gl.expand_dims(query_B < tokens, 0)
        gl.store(count_ptr + list_MB, count_MB, mask=once_MB)
    if FILL:
        for query in range(token, gl.minimum(token + B, tokens)):
            row_ptr = out_ptr + query.to(gl.int64) * out_stride
            _fill(row_ptr, 0, low)
            _fill(row_ptr, high, keys)


@gluon.jit
def indexer_scores_hopper_kernel(
    q_tiles,  # descriptor of the queries as [T * H, D], blocks of B * H rows
    k_tiles,  # of the keys, blocks of 16 rows; where sampled, of every PERIOD-th key
    weight_ptr,
    q_scale_ptr,
    k_scale_ptr,  # of all keys, also where they are sampled
    start_ptr,
    end_ptr,
    chosen_ptr,  # int32 [T]; None: all. Queries without a chosen one among the program's eight are left out
    threshold_ptr,  # None: every score is stored; else those above, as (key, score)
    out_ptr,  # scores, or lists [T, 4, SLOTS] of int64
    count_ptr,  # [T, 4], what would be in the lists if they were long enough
    tokens,
    keys,
    out_stride,
    nought,
    PERIOD: gl.constexpr,
    STAGES: gl.constexpr,
    SLOTS: gl.constexpr,
    FILL: gl.constexpr,  # -inf where no query of a program sees a key; else nothing is stored there
    EARLY: gl.constexpr,  # 1: a product is issued before the scores of the last tile are stored, one more at the end
    IN_TURN: gl.constexpr,  # the groups' products wait for each other
):
    dtype: gl.constexpr = k_tiles.dtype
    WIDTH: gl.constexpr = k_tiles.block_shape[1]
    PARTS_OF_D: gl.constexpr = 128 // WIDTH  # pieces of 128 bytes
    shared: gl.constexpr = gl.NVMMASharedLayout(128, dtype.primitive_bitwidth, 2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(dtype, [2 * PARTS_OF_D, B * HEADS, WIDTH], shared)
    k_quarters = gl.allocate_shared_memory(dtype, [STAGES * PARTS_OF_D * 4, 16, WIDTH], shared)
    k = k_quarters._reinterpret(dtype, [STAGES * PARTS_OF_D, 64, WIDTH], shared)
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(turn.index(0), count=1)
    mbarrier.init(turn.index(1), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)
    fence_async_shared()
    thread_barrier()
    barriers = (q_ready, ready, free, turn)
    gl.warp_specialize(
        [
            (_consumer, (
                q, k, barriers, weight_ptr, q_scale_ptr, k_scale_ptr, start_ptr, end_ptr, chosen_ptr, threshold_ptr,
                out_ptr, count_ptr, tokens, keys, out_stride, nought, PERIOD, STAGES, SLOTS, FILL, EARLY,
                IN_TURN, gl.constexpr(0),
            )),
            (_consumer, (
                q, k, barriers, weight_ptr, q_scale_ptr, k_scale_ptr, start_ptr, end_ptr, chosen_ptr, threshold_ptr,
                out_ptr, count_ptr, tokens, keys, out_stride, nought, PERIOD, STAGES, SLOTS, FILL, EARLY,
                IN_TURN, gl.constexpr(1),
            )),
            (_producer, (
                q_tiles, k_tiles, q, k_quarters, barriers, start_ptr, end_ptr, chosen_ptr, tokens, keys, PERIOD, STAGES,
                EARLY,
            )),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip


def supports(q_THD: Tensor, k_SD: Tensor) -> bool:
    """Shapes, dtypes and strides that the layouts and the copy engine take; on Hopper only."""
    kinds = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    return q_THD.dtype in kinds and q_THD.shape[1:] == (64, 128) and aligned(k_SD)


def launch(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    q_scale_TH: Tensor | None,
    k_scale_S: Tensor | None,
    out: Tensor,
    *,
    fill: bool = False,
    period: int = 1,
    windows: int = 1,
    chosen_T: Tensor | None = None,
    threshold_T: Tensor | None = None,
    counts_TL: Tensor | None = None,
) -> None:
    """Writes scores to `out` [T, S] fp32, of every `period`-th key where asked: key `period // 2` is the first of them.

    With `threshold_T`, what is above it goes to the lists `out` [T, 4, slots] int64, and its number to `counts_TL`.
    `windows` splits the keys among programs (scores without `fill` only)."""
    tokens, heads, dim = q_THD.shape
    q_ND = q_THD.reshape(tokens * heads, dim)
    q_ND = q_ND.clone() if q_ND.data_ptr() % 16 else q_ND
    sampled_SD = k_SD[period // 2 :: period]
    width = 128 // q_THD.element_size()
    shared = gl.NVMMASharedLayout(128, 8 * q_THD.element_size(), 2)
    indexer_scores_hopper_kernel[(triton.cdiv(tokens, QUERIES), windows)](
        TensorDescriptor.from_tensor(q_ND, [QUERIES // 2 * heads, width], shared),
        TensorDescriptor.from_tensor(sampled_SD, [16, width], shared),
        weight_TH,
        q_scale_TH,
        k_scale_S,
        key_start_T,
        key_end_T,
        chosen_T,
        threshold_T,
        out,
        counts_TL,
        tokens,
        sampled_SD.shape[0],
        out.stride(0),
        0,
        PERIOD=period,
        STAGES=6 if q_THD.element_size() == 1 else 3,
        SLOTS=out.shape[-1] if threshold_T is not None else 0,
        FILL=fill,
        EARLY=int(threshold_T is not None),
        IN_TURN=threshold_T is not None and q_THD.element_size() == 1,
        num_warps=4,
        maxnreg=168,
    )
