"""Selection over a paged cache of e4m3 keys for Hopper in Gluon, where the query tokens fill the card.

As in `kernels.indexer_topk.gluon`, which has the steps and why the result is exact: a threshold is guessed from every
64th position, and only what passes it leaves the score kernel. What limits this one is memory: it reads each key once
and computes little. So a producer warp keeps 16 tiles of 64 keys on their way, and two consumer warpgroups score them.

A program serves a part of one token's pages. Each of its eight consumer warps owns a run of neighbouring pages: a tile
is 16 rows from each of four pages, and row 16 w + r belongs to warp w. So a warp sees its positions in ascending order,
appends those above the threshold to a list of its own, and the lists one behind the other are in order.

Legend: T query tokens, H = 64 heads, D = 128, pages of 64 keys; N sequences; M = 64 keys of a tile, K slots, L lists of
a token, C slots of a list.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.indexer_scores.gluon import KEY, QUERY, SCORES, _append, thread_barrier
from kernels.indexer_scores.triton import INTERPRETED, block_range, load_queries, load_weights, score_range
from kernels.indexer_topk.gluon import BYTES, PERIOD, pays, select_from_lists_kernel, slots_of_lists
from kernels.indexer_topk.triton import launch as launch_in_full
from kernels.launch import capability, processors
from kernels.topk.triton import LOWEST_KEY, MINUS_INFINITY_KEY, empty_result

PAGE = gl.constexpr(64)
HEADS = gl.constexpr(64)
DIM = gl.constexpr(128)
RUNS = gl.constexpr(8)  # of a program: one for each consumer warp
STAGES = gl.constexpr(16)  # tiles in flight: those of two pages of each run
PRODUCT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 32]))
SAMPLED = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
COPIED = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))  # scales of a tile, by the producer warp
SHARED = gl.NVMMASharedLayout(128, 8, 2)
MOST_PAGES = 4096  # of a sequence: a group holds the sampled scores of all of them
MOST_SPLITS = 4  # parts of a token's pages
SEARCH = {"R": 2, "W": 512, "num_warps": 16}
SAMPLED_AT_ONCE = 256  # positions of a program


@triton.jit
def sample_kernel(
    q_ptr,
    k_ptr,
    weight_ptr,
    q_scale_ptr,
    k_scale_ptr,
    end_ptr,
    table_ptr,
    sequence_ptr,
    sample_ptr,  # [T, a slot for each sampled position]
    tokens,
    keys,
    sample_stride,
    q_stride,
    k_stride,
    table_stride,
    sequences,
    pages,
    page_stride,
    scale_page_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    PERIOD: tl.constexpr,
    PART: tl.constexpr,
    M: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores of the last position of every PERIOD, PART of them a program. The last key of a page lies next to its
    scale where scales follow keys."""
    token = tl.program_id(0)
    start_B, end_B, present_B, _low, end = block_range(None, end_ptr, token, tokens, keys, 1)
    sequence = tl.minimum(tl.maximum(tl.load(sequence_ptr + token), 0), sequences - 1)
    q_ND = load_queries(q_ptr, token, tokens, q_stride, H, H, D, H)
    weight_N = load_weights(weight_ptr, q_scale_ptr, token, tokens, H, H, H)
    low = tl.program_id(1) * PART
    high = tl.minimum(low + PART, end // PERIOD)
    score_range(
        sample_ptr + (token + tl.arange(0, 1)).to(tl.int64) * sample_stride, q_ND, weight_N, k_ptr, k_scale_ptr,
        k_stride, start_B, end_B, present_B, low, high, keys, PERIOD, PERIOD - 1,
        table_ptr + sequence.to(tl.int64) * table_stride, pages, page_stride, scale_page_stride,
        1, H, D, M, PAGE, STAGES, UPCAST, False,
    )  # fmt: skip


@gluon.jit
def _part(end_ptr, table_pages, SPLITS: gl.constexpr):
    """(token, its keys, its pages, pages of a run, first run) of a program; no pages where its part has none."""
    token = gl.program_id(0) // SPLITS
    first = gl.program_id(0) % SPLITS * RUNS
    end = gl.minimum(gl.load(end_ptr + token).to(gl.int32), table_pages * PAGE)
    pages = (gl.maximum(end, 0) + (PAGE - 1)) // PAGE
    run = (pages + (SPLITS * RUNS - 1)) // (SPLITS * RUNS)
    return token, end, pages, gl.where(first * run < pages, run, 0), first


@gluon.jit
def _page(table_ptr, place, pages, cache_pages):
    """The cache page at a place of the table. Past the last page the last one stands in: its scores are masked."""
    page = gl.load(table_ptr + gl.minimum(place, pages - 1)).to(gl.int32)
    return gl.minimum(gl.maximum(page, 0), cache_pages - 1)


@gluon.jit
def _producer(
    q_tile, k_tiles, q, k_pieces, scales, barriers, scale_ptr, table_ptr, sequence_ptr, end_ptr, sequences, table_pages,
    table_stride, cache_pages, rows_of_page, scale_stride, SPLITS: gl.constexpr,
):  # fmt: skip
    q_ready, ready, free = barriers
    token, _end, pages, run, first = _part(end_ptr, table_pages, SPLITS)
    sequence = gl.minimum(gl.maximum(gl.load(sequence_ptr + token).to(gl.int32), 0), sequences - 1)
    table_ptr += sequence.to(gl.int64) * table_stride
    row_M = gl.arange(0, 64, COPIED)
    if run > 0:
        mbarrier.expect(q_ready, HEADS * DIM)
        tma.async_copy_global_to_shared(q_tile, [token * HEADS, 0], q_ready, q)
    for place in range(run):
        phase = ((place >> 1) & 1) ^ 1
        for group in gl.static_range(2):
            begin = (first + group * 4) * run + place
            page0 = _page(table_ptr, begin, pages, cache_pages) * rows_of_page
            page1 = _page(table_ptr, begin + run, pages, cache_pages) * rows_of_page
            page2 = _page(table_ptr, begin + 2 * run, pages, cache_pages) * rows_of_page
            page3 = _page(table_ptr, begin + 3 * run, pages, cache_pages) * rows_of_page
            if scale_ptr is not None:
                page_M = _page(table_ptr, begin + row_M // 16 * run, pages, cache_pages)
                scale_ptr_M = scale_ptr + page_M.to(gl.int64) * scale_stride + row_M % 16
            for piece in gl.static_range(4):
                slot = (place & 1) * 8 + group * 4 + piece
                mbarrier.wait(free.index(slot), phase)
                mbarrier.expect(ready.index(slot), 64 * DIM)
                row = piece * 16
                here = ready.index(slot)
                tma.async_copy_global_to_shared(k_tiles, [page0 + row, 0], here, k_pieces.index(slot * 4))
                tma.async_copy_global_to_shared(k_tiles, [page1 + row, 0], here, k_pieces.index(slot * 4 + 1))
                tma.async_copy_global_to_shared(k_tiles, [page2 + row, 0], here, k_pieces.index(slot * 4 + 2))
                tma.async_copy_global_to_shared(k_tiles, [page3 + row, 0], here, k_pieces.index(slot * 4 + 3))
                if scale_ptr is not None:
                    async_copy.async_copy_global_to_shared(scales.index(slot), scale_ptr_M + row)
                    async_copy.mbarrier_arrive(here, increment_count=False)


@gluon.jit
def _threshold(sample_ptr, end, wanted, SAMPLE: gl.constexpr, PERIOD: gl.constexpr):
    """As `kernels.topk.triton.likely_threshold`: just below the `wanted` best of the sample or a few more; -inf where
    there are not as many."""
    index_N = gl.arange(0, SAMPLE, SAMPLED)
    inside_N = index_N * PERIOD + (PERIOD - 1) < end
    score_N = gl.load(sample_ptr + index_N, mask=inside_N, other=float("-inf"))
    bits_N = gl.where(score_N == score_N, score_N, float("-inf")).to(gl.int32, bitcast=True)
    bits_N = gl.where(bits_N == LOWEST_KEY, 0, bits_N)
    key_N = bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)
    valid_N = key_N > MINUS_INFINITY_KEY
    valid = gl.sum(valid_N.to(gl.int32), 0)
    low = gl.min(gl.where(valid_N, key_N, 2147483647), 0) - 1
    high = gl.max(key_N, 0)
    found = valid
    limit = wanted + wanted // 16
    while (found > limit) & (high - 1 > low):
        middle = (low & high) + ((low ^ high) >> 1)
        above = gl.sum((key_N > middle).to(gl.int32), 0)
        enough = above >= wanted
        low = gl.where(enough, middle, low)
        found = gl.where(enough, above, found)
        high = gl.where(enough, high, middle)
    # a plateau at `high`: just below it, so that its members may pass (below 0 lies -0.0, which does not let 0.0 pass)
    key = gl.where(found > limit, gl.where(high == 0, -2, high - 1), low)
    guess = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(gl.float32, bitcast=True)
    return gl.where(valid > wanted, guess, float("-inf"))


@gluon.jit
def _consumer(
    q, k, scales, barriers, weight_ptr, q_scale_ptr, scale_ptr, sample_ptr, threshold_ptr, end_ptr, list_ptr, count_ptr,
    table_pages, sample_stride, wanted, SPLITS: gl.constexpr, SLOTS: gl.constexpr, SAMPLE: gl.constexpr,
    PERIOD: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    q_ready, ready, free = barriers
    token, end, _pages, run, first = _part(end_ptr, table_pages, SPLITS)
    head_N = token * HEADS + gl.arange(0, HEADS, gl.SliceLayout(0, PRODUCT))
    weight_N = gl.load(weight_ptr + head_N).to(gl.float32)
    if q_scale_ptr is not None:
        weight_N *= gl.load(q_scale_ptr + head_N)
    # meanwhile the producer fills the tiles
    threshold = _threshold(sample_ptr + token.to(gl.int64) * sample_stride, end, wanted, SAMPLE, PERIOD)
    threshold = gl.where(end <= SLOTS, float("-inf"), threshold)  # the lists have room for all keys
    if (first + G) == 0:
        gl.store(threshold_ptr + token, threshold)
    row_M = gl.arange(0, 64, KEY)
    run_M = first + G * 4 + row_M // 16
    key_M = run_M * run * PAGE + row_M % 16
    last_M = gl.minimum((run_M + 1) * run * PAGE, end)
    # of the four lanes that hold a row, the one of column 0 appends it
    nought_MB = gl.zeros([64, 4], gl.int32, SCORES)
    appends_B = gl.arange(0, 4, QUERY) == 0
    list_MB = gl.expand_dims(token * (SPLITS * RUNS) + run_M, 1) + nought_MB
    list_ptr_MB = (list_ptr + list_MB.to(gl.int64) * SLOTS).to(gl.int64)
    lanes_MB = nought_MB + 0x11111111
    slots_MB = nought_MB + SLOTS
    count_MB = nought_MB
    nothing = gl.zeros([64, HEADS], gl.float32, PRODUCT)
    if run > 0:
        mbarrier.wait(q_ready, 0)
    for place in range(run):
        phase = (place >> 1) & 1
        for piece in gl.static_range(4):
            slot = (place & 1) * 8 + G * 4 + piece
            mbarrier.wait(ready.index(slot), phase)
            product_MN = warpgroup_mma(k.index(slot), q.permute((1, 0)), nothing, use_acc=False, is_async=True)
            if scale_ptr is not None:
                scale_M = scales.index(slot).load(KEY)
            product_MN = warpgroup_mma_wait(0, deps=[product_MN])
            thread_barrier()
            mbarrier.arrive(free.index(slot), count=1)
            score_M = gl.sum(gl.maximum(product_MN, 0.0) * gl.expand_dims(weight_N, 0), 1)
            score_M = gl.convert_layout(score_M, KEY)
            if scale_ptr is not None:
                score_M *= scale_M
            chosen_M = (score_M > threshold) & (key_M < last_M)
            score_MB = gl.expand_dims(score_M, 1) + gl.zeros([64, 4], gl.float32, SCORES)
            chosen_MB = gl.expand_dims(chosen_M, 1) & gl.expand_dims(appends_B, 0)
            key_MB = gl.expand_dims(key_M, 1) + nought_MB
            count_MB = _append(list_ptr_MB, count_MB, score_MB, key_MB, chosen_MB, lanes_MB, slots_MB)
            key_M += 16
    once_MB = gl.expand_dims(row_M % 16 == 0, 1) & gl.expand_dims(appends_B, 0)
    gl.store(count_ptr + list_MB, count_MB, mask=once_MB)


@gluon.jit
def paged_lists_hopper_kernel(
    q_tile,  # descriptor of the queries as [T * H, D], blocks of H rows
    k_tiles,  # of the cache as rows of D bytes, blocks of 16
    weight_ptr,
    q_scale_ptr,
    scale_ptr,  # of the keys
    table_ptr,
    sequence_ptr,
    end_ptr,
    sample_ptr,  # scores of the last position of every PERIOD
    threshold_ptr,  # [T], to be written
    list_ptr,  # [T, L, SLOTS] of (score, position) as int64
    count_ptr,  # [T, L], what would be in the lists if they were long enough
    sequences,
    table_pages,
    table_stride,
    cache_pages,
    rows_of_page,
    scale_stride,
    sample_stride,
    wanted,  # so many of the sampled scores, or a few more, lie above the threshold
    SPLITS: gl.constexpr,
    SLOTS: gl.constexpr,
    SAMPLE: gl.constexpr,
    PERIOD: gl.constexpr,
):
    dtype: gl.constexpr = k_tiles.dtype
    shared: gl.constexpr = k_tiles.layout
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q = gl.allocate_shared_memory(dtype, [HEADS, DIM], shared)
    k_pieces = gl.allocate_shared_memory(dtype, [STAGES * 4, 16, DIM], shared)
    k = k_pieces._reinterpret(dtype, [STAGES, 64, DIM], shared)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [1], barrier)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    arrivals: gl.constexpr = 1 if scale_ptr is None else 33  # the copy engine's, and of the lanes that copied scales
    mbarrier.init(q_ready, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=arrivals)
        mbarrier.init(free.index(i), count=1)
    fence_async_shared()
    thread_barrier()
    barriers = (q_ready, ready, free)
    gl.warp_specialize(
        [
            (_consumer, (
                q, k, scales, barriers, weight_ptr, q_scale_ptr, scale_ptr, sample_ptr, threshold_ptr, end_ptr,
                list_ptr, count_ptr, table_pages, sample_stride, wanted, SPLITS, SLOTS, SAMPLE, PERIOD, gl.constexpr(0),
            )),
            (_consumer, (
                q, k, scales, barriers, weight_ptr, q_scale_ptr, scale_ptr, sample_ptr, threshold_ptr, end_ptr,
                list_ptr, count_ptr, table_pages, sample_stride, wanted, SPLITS, SLOTS, SAMPLE, PERIOD, gl.constexpr(1),
            )),
            (_producer, (
                q_tile, k_tiles, q, k_pieces, scales, barriers, scale_ptr, table_ptr, sequence_ptr, end_ptr, sequences,
                table_pages, table_stride, cache_pages, rows_of_page, scale_stride, SPLITS,
            )),
        ],
        [4, 1],
        [224, 56],
    )  # fmt: skip


def supports(q_THD: Tensor, k_cache_PSD: Tensor, page_table_NP: Tensor, k: int) -> bool:
    """Shapes and strides that the layouts and the copy engine take, and enough tokens and keys to pay; Hopper only."""
    if capability(q_THD.device) != (9, 0) or q_THD.dtype != torch.float8_e4m3fn:
        return False
    shapes = q_THD.shape[1:] == (64, 128) and k_cache_PSD.shape[1:] == (64, 128) and k_cache_PSD.shape[0] > 0
    strides = k_cache_PSD.stride()[1:] == (128, 1) and k_cache_PSD.stride(0) % 128 == 0
    enough = MOST_SPLITS * q_THD.shape[0] >= processors(q_THD.device) and pays(page_table_NP.shape[1] * 64, k)
    enough &= page_table_NP.shape[1] <= MOST_PAGES
    return shapes and strides and k_cache_PSD.data_ptr() % 16 == 0 and enough


def _rows(k_cache_PSD: Tensor) -> Tensor:
    """The cache as rows of 128 bytes, with what lies between its pages: page p begins at row p * stride / 128."""
    pages, page_size, dim = k_cache_PSD.shape
    rows = (pages - 1) * (k_cache_PSD.stride(0) // dim) + page_size
    return k_cache_PSD.as_strided((rows, dim), (dim, 1))


def launch(
    q_THD: Tensor,
    k_cache_PSD: Tensor,
    weight_TH: Tensor,
    page_table_NP: Tensor,
    sequence_T: Tensor,
    key_end_T: Tensor,
    q_scale_TH: Tensor | None,
    k_scale_PS: Tensor | None,
    sample_TS: Tensor,
    wanted: int,
    threshold_T: Tensor,
    lists_TLC: Tensor,
    counts_TL: Tensor,
) -> None:
    """Writes each token's threshold, appends the (score, position) above it to the lists, and writes how many there
    are."""
    splits = lists_TLC.shape[1] // RUNS.value
    paged_lists_hopper_kernel[(q_THD.shape[0] * splits,)](
        TensorDescriptor.from_tensor(q_THD.view(-1, 128), [64, 128], SHARED),
        TensorDescriptor.from_tensor(_rows(k_cache_PSD), [16, 128], SHARED),
        weight_TH,
        q_scale_TH,
        k_scale_PS,
        page_table_NP,
        sequence_T,
        key_end_T,
        sample_TS,
        threshold_T,
        lists_TLC,
        counts_TL,
        page_table_NP.shape[0],
        page_table_NP.shape[1],
        page_table_NP.stride(0),
        k_cache_PSD.shape[0],
        k_cache_PSD.stride(0) // 128,
        0 if k_scale_PS is None else k_scale_PS.stride(0),
        sample_TS.stride(0),
        wanted,
        SPLITS=splits,
        SLOTS=lists_TLC.shape[2],
        SAMPLE=max(512, triton.next_power_of_2(page_table_NP.shape[1])),
        PERIOD=PERIOD,
        num_warps=4,
        maxnreg=168,
    )


def choose_splits(tokens: int, pages: int, device: torch.device) -> int:
    """Parts of a token's pages: what leaves the last wave of programs fullest, with at least 16 pages a run."""
    slots = processors(device)
    most = max(1, min(MOST_SPLITS, pages // (RUNS.value * 16)))
    return min(range(1, most + 1), key=lambda splits: triton.cdiv(tokens * splits, slots) / splits + 0.02 * splits)


def by_threshold(
    q_THD: Tensor,
    k_cache_PSD: Tensor,
    weight_TH: Tensor,
    page_table_NP: Tensor,
    sequence_T: Tensor,
    key_end_T: Tensor,
    k: int,
    q_scale_TH: Tensor | None = None,
    k_scale_PS: Tensor | None = None,
    failed: list[Tensor] | None = None,
    memory_bytes: int = BYTES,
    splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(rows_TK, positions_TK, lengths_T), where `supports` says so; for some tokens after the others. The marks of
    tokens whose guess failed are added to `failed`."""
    tokens, device, pages = q_THD.shape[0], q_THD.device, page_table_NP.shape[1]
    positions_TK, lengths_T = empty_result(tokens, k, device)
    rows_TK = torch.empty_like(positions_TK)
    q_THD = q_THD.contiguous()
    q_THD = q_THD.clone() if q_THD.data_ptr() % 16 else q_THD
    size = slots_of_lists(k)
    splits = splits or choose_splits(tokens, pages, device)
    lists = splits * RUNS.value
    expected = k / PERIOD
    wanted = int(expected + 5 * expected**0.5 + 5)  # five standard deviations, as there
    rows = max(1, min(tokens, memory_bytes // (8 * lists * size)))
    lists_TLC = torch.empty(rows, lists, size, dtype=torch.int64, device=device)
    counts_TL = torch.empty(rows, lists, dtype=torch.int32, device=device)
    sample_TS = torch.empty(rows, triton.cdiv(pages, 16) * 16, dtype=torch.float32, device=device)
    threshold_T = torch.empty(rows, dtype=torch.float32, device=device)
    for first in range(0, tokens, rows):
        here = slice(first, first + rows)
        q, weight, sequence, end = q_THD[here], weight_TH[here], sequence_T[here], key_end_T[here]
        q_scale = None if q_scale_TH is None else q_scale_TH[here]
        positions, rows_here, lengths = positions_TK[here], rows_TK[here], lengths_T[here]
        count = q.shape[0]
        scale_stride = 0 if k_scale_PS is None else k_scale_PS.stride(0)
        sample_kernel[(count, triton.cdiv(pages, SAMPLED_AT_ONCE))](
            q, k_cache_PSD, weight, q_scale, k_scale_PS, end, page_table_NP, sequence, sample_TS, count, pages * 64,
            sample_TS.stride(0), q.stride(0), k_cache_PSD.stride(1), page_table_NP.stride(0), page_table_NP.shape[0],
            k_cache_PSD.shape[0], k_cache_PSD.stride(0), scale_stride,
            H=64, D=128, PAGE=64, PERIOD=PERIOD, PART=SAMPLED_AT_ONCE, M=64, STAGES=4, UPCAST=INTERPRETED, num_warps=4,
        )  # fmt: skip
        launch(
            q, k_cache_PSD, weight, page_table_NP, sequence, end, q_scale, k_scale_PS, sample_TS, wanted, threshold_T,
            lists_TLC, counts_TL,
        )  # fmt: skip
        failed_T = torch.empty(count, dtype=torch.int32, device=device)
        select_from_lists_kernel[(count,)](
            lists_TLC, counts_TL, threshold_T, positions, rows_here, lengths, failed_T, page_table_NP, sequence,
            page_table_NP.shape[0], page_table_NP.stride(0), k, PAGE=64, LISTS=lists, SLOTS=size, **SEARCH,
        )  # fmt: skip
        launch_in_full(
            q, k_cache_PSD, weight, None, end, k, q_scale, k_scale_PS, page_table_NP, sequence, splits=1,
            chosen_T=failed_T, out=(positions, lengths, rows_here),
        )  # fmt: skip
        if failed is not None:
            failed.append(failed_T)
    return rows_TK, positions_TK, lengths_T
