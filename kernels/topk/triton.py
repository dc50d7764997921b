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

MINUS_INFINITY_KEY = tl.constexpr(-2139095041)  # sortable(-inf)
LOWEST_KEY = tl.constexpr(-2147483648)


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
def place(buffer_ptr, count, candidate_WRV, chosen_WRV, R: tl.constexpr):
    """Appends the chosen candidates in their order; returns the new count. Barrier before reading them.

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
    tl.store(buffer_ptr + slot_WRV, candidate_WRV, mask=chosen_WRV)
    return count + (((total * 0x0001000100010001) >> 48) & 0xFFFF).to(tl.int32)


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
def compact(buffer_ptr, count, k, limit, CAPACITY: tl.constexpr, R: tl.constexpr, W: tl.constexpr):
    """Keeps k to `limit` candidates (exactly k where limit == k), among them the k best; order stays ascending.

    Returns (count, threshold): nothing at or below the threshold that comes later can be among the k best.
    Needs count > limit >= k, and a barrier since the candidates were written.
    """
    slot_N = tl.arange(0, CAPACITY)
    # past `count` the buffer is stale, but a load without a mask is 16 bytes wide
    key_N = sortable(candidate_score(tl.load(buffer_ptr + slot_N)))
    lowest = tl.min(tl.where(slot_N < count, key_N, 2147483647), 0)
    key_N = tl.where(slot_N < count, key_N, LOWEST_KEY)
    low, high, found, over = search(key_N, lowest - 1, tl.max(key_N, 0), count, k, limit)
    # still too many: they share one score, `high`, and of those the first ones stay, in slots up to `final`
    tied = found > limit
    cut = tl.where(tied, high, low)
    before = -1
    final = tl.where(tied, count - 1, -1)
    while final - 1 > before:
        middle = (before + final) >> 1
        enough = tl.sum(((key_N == cut) & (slot_N <= middle)).to(tl.int32), 0) >= k - over
        before = tl.where(enough, before, middle)
        final = tl.where(enough, middle, final)
    kept = 0
    for first in range(0, count, 4 * R * W):
        # candidates move towards the front, never past one that is still to be read
        slot_WRV = first + columns(R, W)
        candidate_WRV = tl.load(buffer_ptr + slot_WRV)
        key_WRV = sortable(candidate_score(candidate_WRV))
        keep_WRV = ((key_WRV > cut) & (slot_WRV < count)) | ((key_WRV == cut) & (slot_WRV <= final))
        tl.debug_barrier()
        kept = place(buffer_ptr, kept, candidate_WRV, keep_WRV, R)
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
def topk_kernel(
    score_ptr,
    position_ptr,  # None: a score's position is its column
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
    for task in range(program, tasks, tl.num_programs(0)):
        row = (task // splits).to(tl.int64)
        begin = (task % splits) * split_positions
        end = tl.minimum(begin + split_positions, positions)
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
            next_WRV = tl.load(row_ptr + column_WRV, mask=column_WRV < end, other=float("-inf"))
            column_WRV += CHUNK
            second_WRV = tl.load(row_ptr + column_WRV, mask=column_WRV < end, other=float("-inf"))
            for first in range(begin, end, CHUNK):
                score_WRV = next_WRV.to(tl.float32)
                column_WRV = first + columns(R, W)
                ahead_WRV = column_WRV + 2 * CHUNK
                next_WRV = second_WRV
                second_WRV = tl.load(row_ptr + ahead_WRV, mask=ahead_WRV < end, other=float("-inf"))
                if position_ptr is None:
                    position_WRV = column_WRV
                else:
                    position_ptr_WRV = position_ptr + row * row_stride + column_WRV
                    position_WRV = tl.load(position_ptr_WRV, mask=column_WRV < end, other=-1)
                # NaN compares false
                count = place(buffer_ptr, count, pack(score_WRV, position_WRV), score_WRV > threshold, R)
                last = first + CHUNK >= end
                if (count + CHUNK > CAPACITY) | (last & (count > k)):
                    tl.debug_barrier()
                    count, threshold = compact(buffer_ptr, count, k, tl.where(last, k, limit), CAPACITY, R, W)
            # the guess was too high: once more without
            unfinished = (count < k) & (guess > float("-inf"))
            guess = float("-inf")
            tl.debug_barrier()
        out = (row * splits + task % splits) * k
        for first in range(0, k, CHUNK):
            slot_C = first + tl.arange(0, CHUNK)
            candidate_C = tl.load(buffer_ptr + slot_C)
            filled_C = slot_C < count
            position_C = tl.where(filled_C, candidate_position(candidate_C), -1)
            tl.store(out_position_ptr + out + slot_C, position_C, mask=slot_C < k)
            if out_score_ptr is not None:
                part_score_C = tl.where(filled_C, candidate_score(candidate_C), float("-inf"))
                tl.store(out_score_ptr + out + slot_C, part_score_C, mask=slot_C < k)
        if length_ptr is not None:
            tl.store(length_ptr + row, count)
        tl.debug_barrier()


def buffer_sizes(k: int, warps: int, roomy: bool) -> dict[str, int]:
    """CAPACITY and CHUNK = 4 R W with room for 1.5k (`roomy`: 2k) candidates beside a chunk, so that there is slack
    after a compaction. A small buffer costs fewer registers and more compactions."""
    capacity = max(4096, (4 if roomy else 2) * triton.next_power_of_2(k))
    width = 32 * warps
    return {"CAPACITY": capacity, "R": min(4, max(1, capacity // (16 * width))), "W": width}


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
) -> tuple[Tensor, Tensor]:
    """Launches. `positions_TS` int32 (same strides as the scores) names each score's position, ascending in a row.

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
    indices_TK = torch.empty(rows, k, dtype=torch.int32, device=device)
    lengths_T = torch.empty(rows, dtype=torch.int32, device=device)
    if rows == 0:
        return indices_TK, lengths_T
    slots = per_processor * processors(device)
    if splits is None:
        splits = max(1, min(slots // rows, positions // (2 * capacity)))
    split_positions = triton.cdiv(triton.cdiv(max(positions, 1), splits), chunk) * chunk
    splits = max(1, triton.cdiv(positions, split_positions))
    programs = min(rows * splits, slots)
    part_score = torch.empty(rows, splits * k, dtype=torch.float32, device=device) if splits > 1 else None
    part_position = torch.empty(rows, splits * k, dtype=torch.int32, device=device) if splits > 1 else indices_TK
    topk_kernel[(programs,)](
        scores_TS,
        positions_TS,
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
        return select(part_score, k, part_position, 1, sizes, sample, sigmas, per_processor, options)
    return indices_TK, lengths_T


@torch.library.custom_op("sparseline::topk", mutates_args=())
def topk(scores_TS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `kernels.topk.topk`; fp32, bf16 or fp16 scores."""
    return select(scores_TS if scores_TS.stride(1) == 1 else scores_TS.contiguous(), k)


@topk.register_fake
def _(scores_TS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    rows = scores_TS.shape[0]
    return scores_TS.new_empty(rows, k, dtype=torch.int32), scores_TS.new_empty(rows, dtype=torch.int32)
