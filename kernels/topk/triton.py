"""Exact top-k of each row on a GPU: one read of the scores, whatever their values are.

A row streams by in chunks. Scores above the row's threshold are appended, in ascending position, to a candidate buffer;
when the buffer could not take another chunk it is compacted: a bisection over the order-preserving integer form of the
scores finds a new threshold with at least k candidates above it. So the buffer cannot overflow, for any input, and a
score that is dropped has k better ones (or k equal ones at lower positions) before it. Cost grows where scores ascend
(every chunk passes, every chunk compacts); ties cost nothing, since an equal score at a later position never passes.

Legend: T rows, S positions of a row, K slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import processors

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
MINUS_INFINITY_KEY = tl.constexpr(-2139095041)  # sortable(-inf)
LOWEST_KEY = tl.constexpr(-2147483648)
MERGED = 32768  # candidates that one program merges in its registers


@triton.jit
def sortable(score):
    """int32 in the order of the fp32 scores; -0.0 and 0.0 give the same (0)."""
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits == LOWEST_KEY, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_sortable(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def columns(R: tl.constexpr, W: tl.constexpr):
    """0 .. R*W*4 - 1 as [W, R, 4]: W threads, of each R repetitions, of each four neighbours.

    In this order of dimensions the compiler gives a thread all its repetitions, so that sums over them stay in it.
    """
    column_WR = tl.arange(0, W)[:, None] * 4 + tl.arange(0, R)[None, :] * (4 * W)
    return column_WR[:, :, None] + tl.arange(0, 4)[None, None, :]


@triton.jit
def pack(score, position):
    """A candidate: score bits above, position below."""
    return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | position.to(tl.int64)


@triton.jit
def candidate_score(candidate):
    return (candidate >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def candidate_position(candidate):
    return candidate.to(tl.int32)


@triton.jit
def put(buffer_ptr, slot, score, position, chosen):
    """Stores the chosen candidates in their slots.

    By hand, because the compiler would bring every address and value into another layout first, through shared memory
    and two barriers each, in the hope of neighbouring addresses.
    """
    if INTERPRETED:
        tl.store(buffer_ptr + slot, pack(score, position), mask=chosen)
    else:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred chosen;
            .reg .b64 address;
            setp.ne.s32 chosen, $5, 0;
            mad.wide.s32 address, $2, 8, $1;
            @chosen st.global.v2.b32 [address], {$4, $3};
            mov.b32 $0, 0;
            }
            """,
            "=r,l,r,r,r,r",
            [buffer_ptr.to(tl.int64), slot, score.to(tl.int32, bitcast=True), position, chosen.to(tl.int32)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def slots(count, chosen_WRV, R: tl.constexpr):
    """Where each chosen element goes behind `count` others, in their order, and the new count.

    The counts of a thread's R <= 4 repetitions travel as 16-bit fields of one int64, so that one scan over the threads
    serves them all; the multiplications add up the fields below each field.
    """
    chosen = chosen_WRV.to(tl.int32)
    shift_1R = (16 * tl.arange(0, R))[None, :].to(tl.int64)
    field_W = tl.sum(tl.sum(chosen, 2).to(tl.int64) << shift_1R, 1)
    total = tl.sum(field_W, 0)
    begin_W = tl.cumsum(field_W, 0) - field_W + total * 0x0001000100010000
    begin_WR = ((begin_W[:, None] >> shift_1R) & 0xFFFF).to(tl.int32)
    slot_WRV = count + begin_WR[:, :, None] + tl.cumsum(chosen, 2) - 1
    return slot_WRV, count + (((total * 0x0001000100010001) >> 48) & 0xFFFF).to(tl.int32)


@triton.jit
def place(buffer_ptr, count, score_WRV, position_WRV, chosen_WRV, R: tl.constexpr):
    """Appends the chosen candidates in their order; returns the new count. Barrier before reading them."""
    slot_WRV, count = slots(count, chosen_WRV, R)
    put(buffer_ptr, slot_WRV, score_WRV, position_WRV, chosen_WRV)
    return count


@triton.jit
def columns_of_rows(B: tl.constexpr, R: tl.constexpr, W: tl.constexpr, STRIDE: tl.constexpr):
    """(row * STRIDE + column, column) of B rows as [W, B, R, 4]: W threads a row, else as `columns`."""
    column_WBR = (tl.arange(0, W)[:, None, None] * 4 + tl.arange(0, R)[None, None, :] * (4 * W)) + tl.zeros(
        [1, B, 1], tl.int32
    )
    column_WBRV = column_WBR[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]
    return column_WBRV + tl.arange(0, B)[None, :, None, None] * STRIDE, column_WBRV


@triton.jit
def place_rows(buffer_ptr, count_B, score_WBRV, position_WBRV, chosen_WBRV, R: tl.constexpr, CAPACITY: tl.constexpr):
    """`place` of B rows at once, each into its own buffer: where a warp or less serves a row, its threads wait for no
    others."""
    B: tl.constexpr = count_B.shape[0]
    chosen = chosen_WBRV.to(tl.int32)
    shift_11R = (16 * tl.arange(0, R))[None, None, :].to(tl.int64)
    field_WB = tl.sum(tl.sum(chosen, 3).to(tl.int64) << shift_11R, 2)
    total_B = tl.sum(field_WB, 0)
    # turned, so that the scan runs where the fields are: the threads of a row along the fastest dimension
    begin_WB = tl.trans(tl.cumsum(tl.trans(field_WB), 1)) - field_WB + (total_B * 0x0001000100010000)[None, :]
    begin_WBR = ((begin_WB[:, :, None] >> shift_11R) & 0xFFFF).to(tl.int32)
    first_B = count_B + tl.arange(0, B) * CAPACITY - 1
    slot_WBRV = first_B[None, :, None, None] + begin_WBR[:, :, :, None] + tl.cumsum(chosen, 3)
    put(buffer_ptr, slot_WBRV, score_WBRV, position_WBRV, chosen_WBRV)
    return count_B + (((total_B * 0x0001000100010001) >> 48) & 0xFFFF).to(tl.int32)


@triton.jit
def search(key_N, low, high, found, k, limit):
    """Bisects for (low, high, found, over): above `low` lie found >= k keys, above `high` lie over < k; ends when
    found <= limit, or when low and high are neighbours. Needs: that many keys above the given low, none above high."""
    over = 0
    while (found > limit) & (high - 1 > low):
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, without overflow
        above = tl.sum((key_N > middle).to(tl.int32), 0)
        enough = above >= k
        low = tl.where(enough, middle, low)
        found = tl.where(enough, above, found)
        high = tl.where(enough, high, middle)
        over = tl.where(enough, over, above)
    return low, high, found, over


@triton.jit
def divide(key_N, slot_N, lowest, slots_used, count, k, limit):
    """(cut, final): k to `limit` keys (exactly k where limit == k) lie above `cut`, or are it in a slot up to `final`.

    Needs: `count` keys from `lowest` on, count > limit >= k, all in slots below `slots_used`."""
    low, high, found, over = search(key_N, lowest - 1, tl.max(key_N, 0), count, k, limit)
    # still too many: they share one score, `high`, and of those the first ones stay, in slots up to `final`
    tied = found > limit
    cut = tl.where(tied, high, low)
    before = -1
    final = tl.where(tied, slots_used - 1, -1)
    while final - 1 > before:
        middle = (before + final) >> 1
        enough = tl.sum(((key_N == cut) & (slot_N <= middle)).to(tl.int32), 0) >= k - over
        before = tl.where(enough, before, middle)
        final = tl.where(enough, middle, final)
    return cut, final


@triton.jit
def compact(buffer_ptr, count, k, limit, CAPACITY: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Keeps k to `limit` candidates (exactly k where limit == k), among them the k best; order stays ascending.

    Returns (count, threshold): nothing at or below the threshold that comes later can be among the k best.
    Needs count > limit >= k, and a barrier since the candidates were written.
    """
    slot_N = tl.arange(0, CAPACITY)
    # a mask of fours, so that a load stays 16 bytes wide; past `count` the buffer is stale
    candidate_N = tl.load(buffer_ptr + slot_N, mask=slot_N // 4 * 4 < count, other=0)
    key_N = tl.where(slot_N < count, sortable(candidate_score(candidate_N)), LOWEST_KEY)
    lowest = tl.min(tl.where(slot_N < count, key_N, 2147483647), 0)
    cut, final = divide(key_N, slot_N, lowest, count, count, k, limit)
    kept = 0
    for first in range(0, count, 4 * R * W):
        # candidates move towards the front, never past one that is still to be read
        slot_WRV = first + columns(R, W)
        candidate_WRV = tl.load(buffer_ptr + slot_WRV)
        score_WRV = candidate_score(candidate_WRV)
        key_WRV = sortable(score_WRV)
        keep_WRV = ((key_WRV > cut) & (slot_WRV < count)) | ((key_WRV == cut) & (slot_WRV <= final))
        tl.debug_barrier()
        kept = place(buffer_ptr, kept, score_WRV, candidate_position(candidate_WRV), keep_WRV, R)
    tl.debug_barrier()
    return kept, from_sortable(cut)


@triton.jit
def likely_threshold(score_N, k, positions, SAMPLE: tl.constexpr, SIGMAS: tl.constexpr):
    """A score that more than k of the row's scores are likely to exceed, from an even sample of them; else -inf."""
    expected = k * (SAMPLE / positions.to(tl.float32))
    wanted = (expected + SIGMAS * tl.sqrt(expected) + SIGMAS).to(tl.int32)
    key_N = tl.where(score_N == score_N, sortable(score_N), LOWEST_KEY)
    valid_N = key_N > MINUS_INFINITY_KEY
    valid = tl.sum(valid_N.to(tl.int32), 0)
    lowest = tl.min(tl.where(valid_N, key_N, 2147483647), 0)
    limit = wanted + wanted // 16
    low, high, found, _ = search(key_N, lowest - 1, tl.max(key_N, 0), valid, wanted, limit)
    # a plateau at `high`: just below it, so that its members may pass (below 0 lies -0.0, which does not let 0.0 pass)
    below = tl.where(high == 0, -2, high - 1)
    guess = from_sortable(tl.where(found > limit, below, low))
    return tl.where(valid > wanted, guess, float("-inf"))


@triton.jit
def stream(row_ptr, column_WRV, end):
    """Scores are read once: they shall not push the candidate buffers out of the L2 cache."""
    inside_WRV = column_WRV < end
    return tl.load(row_ptr + column_WRV, mask=inside_WRV, other=float("-inf"), eviction_policy="evict_first")


@triton.jit
def topk_kernel(
    score_ptr,
    position_ptr,  # None: a score's position is its column
    start_ptr,  # None: rows are whole; else columns from start // 16 * 16 to end of each row are read
    end_ptr,
    chosen_ptr,  # None: all rows; else those with a number other than 0, and nothing is written for the others
    out_score_ptr,  # None: only positions are wanted
    out_position_ptr,
    length_ptr,
    buffer_ptr,
    tasks,
    splits,
    positions,
    split_positions,
    row_stride,
    k,
    limit,
    CAPACITY: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    SAMPLE: tl.constexpr,
    SIGMAS: tl.constexpr,  # how far below the expected threshold the guess stays
):
    """One task is one split of one row; a program takes every `num_programs`-th task and keeps one candidate buffer."""
    CHUNK: tl.constexpr = 4 * R * W
    program = tl.program_id(0)
    buffer_ptr += program.to(tl.int64) * CAPACITY
    if chosen_ptr is not None:  # most often there is none
        found = 0
        for task in range(program, tasks, tl.num_programs(0)):
            found |= tl.load(chosen_ptr + task // splits)
        tasks = tl.where(found != 0, tasks, 0)
    for task in range(program, tasks, tl.num_programs(0)):
        row = (task // splits).to(tl.int64)
        begin = (task % splits) * split_positions
        end = tl.minimum(begin + split_positions, positions)
        if end_ptr is not None:
            begin = tl.maximum(begin, tl.load(start_ptr + row).to(tl.int32) // 16 * 16)
            begin = tl.multiple_of(begin, 16)
            end = tl.maximum(tl.minimum(end, tl.load(end_ptr + row).to(tl.int32)), begin)
        slots_out = k
        if chosen_ptr is not None:
            chosen = tl.load(chosen_ptr + row) != 0
            end = tl.where(chosen, end, begin)
            slots_out = tl.where(chosen, k, 0)
        row_ptr = score_ptr + row * row_stride
        guess = float("-inf")
        if end - begin >= 4 * tl.maximum(SAMPLE, k):
            # pieces of 8 neighbours, one memory sector each
            index_N = tl.arange(0, SAMPLE)
            stride = (end - begin) // (SAMPLE // 8) // 8 * 8
            sample_N = tl.load(row_ptr + begin + index_N // 8 * stride + index_N % 8)
            guess = likely_threshold(sample_N.to(tl.float32), k, end - begin, SAMPLE, SIGMAS)
        count = 0
        unfinished = True
        while unfinished:
            count = 0
            threshold = guess
            column_WRV = begin + columns(R, W)
            next_WRV = stream(row_ptr, column_WRV, end)
            column_WRV += CHUNK
            second_WRV = stream(row_ptr, column_WRV, end)
            for first in range(begin, end, CHUNK):
                score_WRV = next_WRV.to(tl.float32)
                column_WRV = first + columns(R, W)
                ahead_WRV = column_WRV + 2 * CHUNK
                next_WRV = second_WRV
                second_WRV = stream(row_ptr, ahead_WRV, end)
                if position_ptr is None:
                    position_WRV = column_WRV
                else:
                    position_ptr_WRV = position_ptr + row * row_stride + column_WRV
                    position_WRV = tl.load(position_ptr_WRV, mask=column_WRV < end, other=-1)
                # NaN compares false
                count = place(buffer_ptr, count, score_WRV, position_WRV, score_WRV > threshold, R)
                last = first + CHUNK >= end
                if (count + CHUNK > CAPACITY) | (last & (count > k)):
                    tl.debug_barrier()
                    count, threshold = compact(buffer_ptr, count, k, tl.where(last, k, limit), CAPACITY, R, W)
            # the guess was too high: once more without
            unfinished = (count < k) & (guess > float("-inf"))
            guess = float("-inf")
            tl.debug_barrier()
        out = (row * splits + task % splits) * k
        for first in range(0, slots_out, CHUNK):
            slot_C = first + tl.arange(0, CHUNK)
            candidate_C = tl.load(buffer_ptr + slot_C)
            filled_C = slot_C < count
            position_C = tl.where(filled_C, candidate_position(candidate_C), -1)
            tl.store(out_position_ptr + out + slot_C, position_C, mask=slot_C < k)
            if out_score_ptr is not None:
                part_score_C = tl.where(filled_C, candidate_score(candidate_C), float("-inf"))
                tl.store(out_score_ptr + out + slot_C, part_score_C, mask=slot_C < k)
        if length_ptr is not None:
            tl.store(length_ptr + row, count, mask=slots_out > 0)
        tl.debug_barrier()


@triton.jit
def merge_kernel(
    score_ptr,
    position_ptr,
    out_position_ptr,
    length_ptr,
    candidates,
    k,
    CAPACITY: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """One row, all of its candidates in registers at once."""
    CHUNK: tl.constexpr = 4 * R * W
    row = tl.program_id(0).to(tl.int64)
    score_ptr += row * candidates
    position_ptr += row * candidates
    out_position_ptr += row * k
    slot_N = tl.arange(0, CAPACITY)
    score_N = tl.load(score_ptr + slot_N, mask=slot_N < candidates, other=float("-inf"))
    key_N = sortable(score_N)
    count = tl.sum((key_N > MINUS_INFINITY_KEY).to(tl.int32), 0)
    cut = MINUS_INFINITY_KEY
    final = -1
    if count > k:
        filled_N = key_N > MINUS_INFINITY_KEY
        lowest = tl.min(tl.where(filled_N, key_N, 2147483647), 0)
        cut, final = divide(key_N, slot_N, lowest, candidates, count, k, k)
    kept = 0
    for first in range(0, candidates, CHUNK):
        slot_WRV = first + columns(R, W)
        inside_WRV = slot_WRV < candidates
        key_WRV = sortable(tl.load(score_ptr + slot_WRV, mask=inside_WRV, other=float("-inf")))
        position_WRV = tl.load(position_ptr + slot_WRV, mask=inside_WRV, other=-1)
        keep_WRV = (key_WRV > cut) | ((key_WRV == cut) & (slot_WRV <= final))
        out_WRV, kept = slots(kept, keep_WRV, R)
        tl.store(out_position_ptr + out_WRV, position_WRV, mask=keep_WRV)
    tl.store(length_ptr + row, kept)
    for first in range(kept // CHUNK * CHUNK, k, CHUNK):
        slot_C = first + tl.arange(0, CHUNK)
        tl.store(out_position_ptr + slot_C, tl.full([CHUNK], -1, tl.int32), mask=(slot_C >= kept) & (slot_C < k))


def buffer_sizes(k: int, warps: int, roomy: bool) -> dict[str, int]:
    """CAPACITY and CHUNK = 4 R W with room for 1.5k (`roomy`: 2k) candidates beside a chunk, so that there is slack
    after a compaction. A small buffer costs fewer registers and more compactions."""
    capacity = max(4096, (4 if roomy else 2) * triton.next_power_of_2(k))
    width = 32 * warps
    return {"CAPACITY": capacity, "R": min(4, max(1, capacity // (16 * width))), "W": width}


def empty_result(rows: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(rows, k, dtype=torch.int32, device=device),
        torch.empty(rows, dtype=torch.int32, device=device),
    )


def select(
    scores_TS: Tensor,
    k: int,
    positions_TS: Tensor | None = None,
    splits: int | None = None,
    sizes: dict[str, int] | None = None,
    sample: int = 4096,
    sigmas: float = 3.5,
    per_processor: int | None = None,
    options: dict[str, int] | None = None,
    range_T: tuple[Tensor, Tensor] | None = None,
    chosen_T: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches. `range_T`: first column of each row, and the one behind its last. `chosen_T` int32: rows with a 0 are
    left alone in `out`.

    `positions_TS` int32 (same strides as the scores) names each score's position, ascending in a row.

    `splits` parts of a row are selected at the same time and merged: part after part is ascending position again.
    """
    rows, positions = scores_TS.shape
    device = scores_TS.device
    sizes = sizes or buffer_sizes(k, 4, roomy=False)
    # measured: many programs with some spilled registers beat fewer without
    small = sizes["CAPACITY"] <= 4096
    options = options or {"num_warps": 4, "maxnreg": 80 if small else 128}
    per_processor = per_processor or (6 if small else 4)
    capacity, chunk = sizes["CAPACITY"], 4 * sizes["R"] * sizes["W"]
    indices_TK, lengths_T = out or empty_result(rows, k, device)
    if rows == 0:
        return indices_TK, lengths_T
    slots = per_processor * processors(device)
    if splits is None:
        splits = 1 if chosen_T is not None else max(1, min(slots // rows, positions // (2 * capacity)))
    split_positions = triton.cdiv(triton.cdiv(max(positions, 1), splits), chunk) * chunk
    splits = max(1, triton.cdiv(positions, split_positions))
    programs = min(rows * splits, slots)
    part_score = torch.empty(rows, splits * k, dtype=torch.float32, device=device) if splits > 1 else None
    part_position = torch.empty(rows, splits * k, dtype=torch.int32, device=device) if splits > 1 else indices_TK
    topk_kernel[(programs,)](
        scores_TS,
        positions_TS,
        *(range_T or (None, None)),
        chosen_T,
        part_score,
        part_position,
        None if splits > 1 else lengths_T,
        torch.empty(programs, capacity, dtype=torch.int64, device=device),
        rows * splits,
        splits,
        positions,
        split_positions,
        scores_TS.stride(0),
        k,
        min(k + k // 4, capacity - chunk),
        SAMPLE=sample,
        SIGMAS=sigmas,
        **sizes,
        **options,
    )
    if part_score is not None:
        return merge(part_score, k, part_position)
    return indices_TK, lengths_T


def merge(scores_TS: Tensor, k: int, positions_TS: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k of what parts of a row selected beside each other; -inf marks the slots that no candidate filled."""
    rows, candidates = scores_TS.shape
    if candidates > MERGED:
        return select(scores_TS, k, positions_TS, 1)
    capacity = triton.next_power_of_2(candidates)
    warps = min(16, max(4, capacity // 512))
    indices_TK, lengths_T = empty_result(rows, k, scores_TS.device)
    merge_kernel[(rows,)](
        scores_TS, positions_TS, indices_TK, lengths_T, candidates, k,
        CAPACITY=capacity, R=1, W=32 * warps, num_warps=warps,
    )  # fmt: skip
    return indices_TK, lengths_T


@torch.library.custom_op("sparseline::topk", mutates_args=())
def topk(scores_TS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `kernels.topk.topk`; fp32, bf16 or fp16 scores."""
    return select(scores_TS if scores_TS.stride(1) == 1 else scores_TS.contiguous(), k)


@topk.register_fake
def _(scores_TS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = scores_TS.shape[0]
    return scores_TS.new_empty(rows, k, dtype=torch.int32), scores_TS.new_empty(rows, dtype=torch.int32)
