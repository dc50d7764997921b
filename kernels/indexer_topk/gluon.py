"""Selection of many queries on a Hopper card: the scores that cannot be among the k best never leave the score kernel.

1. Every 64th key is scored, and a threshold guessed that more than k of a query's scores exceed
   (`kernels.topk.triton.likely_threshold`).
2. `kernels.indexer_scores.gluon` scores all keys and appends what is above the threshold to the query's lists.
3. The k best of the lists are found by bisection, as in `kernels.topk.triton`; the lists are in the order of the keys.
4. Where a guess was too high, or so low that a list could not hold what passed (ties, clusters), the query is marked,
   and its scores and top-k are taken in full, by the same score kernel: the result is exact for any input.

Legend: T query tokens, S keys, K slots, L lists of a query (4).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.indexer_scores import gluon
from kernels.topk.triton import (
    MINUS_INFINITY_KEY,
    candidate_position,
    candidate_score,
    divide,
    empty_result,
    likely_threshold,
    select,
    slots,
    sortable,
)

PERIOD = 64  # of the sampled keys
BYTES = 1 << 30  # of lists, or of scores, that exist at the same time


@triton.jit
def threshold_kernel(
    sample_ptr, start_ptr, end_ptr, threshold_ptr, keys, stride, k, room, SAMPLE: tl.constexpr, PERIOD: tl.constexpr
):
    """-inf where the lists have room for all keys of a query."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.maximum(tl.load(start_ptr + row).to(tl.int32), 0)
    end = tl.minimum(tl.load(end_ptr + row).to(tl.int32), keys)
    key_N = tl.arange(0, SAMPLE) * PERIOD + PERIOD // 2
    inside_N = (key_N >= start) & (key_N < end)
    sample_N = tl.load(sample_ptr + row * stride + tl.arange(0, SAMPLE), mask=inside_N, other=float("-inf"))
    # five standard deviations: on independent scores one guess of a million is too high
    guess = likely_threshold(sample_N, k, tl.full([], SAMPLE * PERIOD, tl.int32), SAMPLE, 5.0)
    tl.store(threshold_ptr + row, tl.where(end - start <= room, float("-inf"), guess))


@triton.jit
def _places(slot_N, count_ptr, LISTS: tl.constexpr, SLOTS: tl.constexpr):
    """Where in the lists of a query the candidates lie that are `slot_N` when the lists are put behind one another."""
    place_N = slot_N
    begin = 0
    for i in tl.static_range(1, LISTS):
        count = tl.load(count_ptr + i - 1)
        begin += count
        place_N += tl.where(slot_N >= begin, SLOTS - count, 0)
    return place_N


@triton.jit
def select_from_lists_kernel(
    list_ptr,  # [T, LISTS, SLOTS] of (score, position)
    count_ptr,  # [T, LISTS]
    threshold_ptr,
    out_position_ptr,
    out_row_ptr,  # None: positions are all that is wanted; else cache rows, by the page table
    length_ptr,
    failed_ptr,
    table_ptr,
    sequence_ptr,
    sequences,
    table_stride,
    k,
    PAGE: tl.constexpr,
    LISTS: tl.constexpr,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """SLOTS candidates of a query at most, in all of its lists together."""
    CHUNK: tl.constexpr = 4 * R * W
    row = tl.program_id(0).to(tl.int64)
    list_ptr += row * (LISTS * SLOTS)
    count_ptr += row * LISTS
    out_position_ptr += row * k
    if out_row_ptr is not None:
        out_row_ptr += row * k
        sequence = tl.minimum(tl.maximum(tl.load(sequence_ptr + row), 0), sequences - 1)
        table_ptr += sequence.to(tl.int64) * table_stride
    count = 0
    for i in tl.static_range(LISTS):
        count += tl.load(count_ptr + i)
    failed = (count > SLOTS) | ((count < k) & (tl.load(threshold_ptr + row) > float("-inf")))
    tl.store(failed_ptr + row, failed.to(tl.int32))
    count = tl.where(failed, 0, count)
    cut = MINUS_INFINITY_KEY
    final = -1
    if count > k:
        slot_N = tl.arange(0, SLOTS)
        # scores only: the upper halves
        score_ptr_N = list_ptr.to(tl.pointer_type(tl.float32)) + 2 * _places(slot_N, count_ptr, LISTS, SLOTS) + 1
        key_N = sortable(tl.load(score_ptr_N, mask=slot_N < count, other=float("-inf")))
        lowest = tl.min(tl.where(slot_N < count, key_N, 2147483647), 0)
        cut, final = divide(key_N, slot_N, lowest, count, count, k, k)
    kept = 0
    for first in range(0, count, CHUNK):
        slot_WR = first + tl.arange(0, W)[:, None] * 4 + tl.arange(0, R)[None, :] * (4 * W)
        slot_WRV = slot_WR[:, :, None] + tl.arange(0, 4)[None, None, :]
        inside_WRV = slot_WRV < count
        candidate_WRV = tl.load(list_ptr + _places(slot_WRV, count_ptr, LISTS, SLOTS), mask=inside_WRV, other=0)
        key_WRV = sortable(candidate_score(candidate_WRV))
        keep_WRV = inside_WRV & ((key_WRV > cut) | ((key_WRV == cut) & (slot_WRV <= final)))
        out_WRV, kept = slots(kept, keep_WRV, R)
        position_WRV = candidate_position(candidate_WRV)
        tl.store(out_position_ptr + out_WRV, position_WRV, mask=keep_WRV)
        if out_row_ptr is not None:
            page_WRV = tl.load(table_ptr + position_WRV // PAGE, mask=keep_WRV, other=0).to(tl.int32)
            tl.store(out_row_ptr + out_WRV, page_WRV * PAGE + position_WRV % PAGE, mask=keep_WRV)
    tl.store(length_ptr + row, kept)
    for first in range(kept // CHUNK * CHUNK, k, CHUNK):
        slot_C = first + tl.arange(0, CHUNK)
        tl.store(out_position_ptr + slot_C, tl.full([CHUNK], -1, tl.int32), mask=(slot_C >= kept) & (slot_C < k))
        if out_row_ptr is not None:
            tl.store(out_row_ptr + slot_C, tl.full([CHUNK], -1, tl.int32), mask=(slot_C >= kept) & (slot_C < k))


def slots_of_lists(k: int) -> int:
    """Room for about twice the candidates that a guess lets pass: 64 (k/64 + 5 sqrt(k/64) + 5)."""
    return max(4096, 4 * triton.next_power_of_2(k))


def pays(keys: int, k: int) -> bool:
    return keys >= 2 * slots_of_lists(k)


class Inputs(NamedTuple):
    """What `kernels.indexer_scores.gluon.launch` begins with."""

    q_THD: Tensor
    k_SD: Tensor
    weight_TH: Tensor
    key_start_T: Tensor
    key_end_T: Tensor
    q_scale_TH: Tensor | None
    k_scale_S: Tensor | None

    def of(self, queries: slice) -> "Inputs":
        return Inputs(
            self.q_THD[queries],
            self.k_SD,
            self.weight_TH[queries],
            self.key_start_T[queries],
            self.key_end_T[queries],
            None if self.q_scale_TH is None else self.q_scale_TH[queries],
            self.k_scale_S,
        )


def by_threshold(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    q_scale_TH: Tensor | None = None,
    k_scale_S: Tensor | None = None,
    failed: list[Tensor] | None = None,
    memory_bytes: int = BYTES,
) -> tuple[Tensor, Tensor]:
    """Launches, for some queries after the others. The marks of queries whose guess failed are added to `failed`."""
    inputs = Inputs(q_THD, k_SD, weight_TH, key_start_T, key_end_T, q_scale_TH, k_scale_S)
    tokens, device = q_THD.shape[0], q_THD.device
    indices_TK, lengths_T = empty_result(tokens, k, device)
    size = slots_of_lists(k)
    rows = min(tokens, memory_bytes // (8 * gluon.LISTS * size))
    lists_TLC = torch.empty(rows, gluon.LISTS, size, dtype=torch.int64, device=device)
    for first in range(0, tokens, rows):
        here = slice(first, first + rows)
        marks_T = _by_threshold(inputs.of(here), k, indices_TK[here], lengths_T[here], lists_TLC)
        if failed is not None:
            failed.append(marks_T)
    return indices_TK, lengths_T


def _by_threshold(inputs: Inputs, k: int, indices_TK: Tensor, lengths_T: Tensor, lists_TLC: Tensor) -> Tensor:
    tokens, keys, device = inputs.q_THD.shape[0], inputs.k_SD.shape[0], inputs.q_THD.device
    start_T, end_T = inputs.key_start_T, inputs.key_end_T
    sampled = triton.cdiv(keys - PERIOD // 2, PERIOD)
    sample_TS = torch.empty(tokens, triton.cdiv(sampled, 16) * 16, dtype=torch.float32, device=device)
    gluon.launch(*inputs, sample_TS, period=PERIOD)
    threshold_T = torch.empty(tokens, dtype=torch.float32, device=device)
    size = lists_TLC.shape[2]
    threshold_kernel[(tokens,)](
        sample_TS, start_T, end_T, threshold_T, keys, sample_TS.stride(0), k, size,
        SAMPLE=triton.next_power_of_2(sampled), PERIOD=PERIOD, num_warps=4 if sampled <= 4096 else 16,
    )  # fmt: skip
    counts_TL = torch.empty(tokens, gluon.LISTS, dtype=torch.int32, device=device)
    gluon.launch(*inputs, lists_TLC[:tokens], threshold_T=threshold_T, counts_TL=counts_TL)
    failed_T = torch.empty(tokens, dtype=torch.int32, device=device)
    select_from_lists_kernel[(tokens,)](
        lists_TLC, counts_TL, threshold_T, indices_TK, None, lengths_T, failed_T, None, None, 1, 0, k, PAGE=1,
        LISTS=gluon.LISTS, SLOTS=size, R=4, W=128, num_warps=4,
    )  # fmt: skip
    # the lists are done with: their memory takes the scores of those that failed
    columns = triton.cdiv(keys, 16) * 16
    memory = lists_TLC.view(-1).view(torch.float32)
    if memory.numel() < columns:
        memory = torch.empty(columns, dtype=torch.float32, device=device)
    rows = min(tokens, memory.numel() // columns)
    for first in range(0, tokens, rows):
        here = slice(first, first + rows)
        part = inputs.of(here)
        scores_TS = memory[: part.q_THD.shape[0] * columns].view(-1, columns)[:, :keys]
        gluon.launch(*part, scores_TS, windows=4, chosen_T=failed_T[here])
        select(
            scores_TS,
            k,
            range_T=(part.key_start_T, part.key_end_T),
            chosen_T=failed_T[here],
            out=(indices_TK[here], lengths_T[here]),
        )
    return failed_T
