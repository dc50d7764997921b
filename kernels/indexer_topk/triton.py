"""Indexer scores and top-k: in one kernel, whose scores go through a chunk that stays in the L2 cache, never through a
full matrix; or, where the queries fill a card, in two (`by_rows`), some queries after the others. On Hopper
`kernels.indexer_topk.gluon` is faster than either.

A program owns a block of queries and a split of their keys. It scores a chunk of keys into its scratch, then lets each
query's row pass the threshold into its candidate buffer, as `kernels.topk.triton` does (that file says why the buffer
cannot overflow and why the result is exact). Splits are merged by the same top-k.

Legend: T query tokens, S keys, H heads, D head dim, K slots; in a program B queries, N = B * padded heads columns,
M keys of a tile, C keys of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.indexer_scores.triton import (
    INTERPRETED,
    block_range,
    describable,
    hopper_kernel,
    load_queries,
    load_weights,
    padded_heads,
    score_range,
    tile_shape,
)
from kernels.indexer_scores.triton import scores as score_rows
from kernels.launch import processors
from kernels.topk.triton import (
    buffer_sizes,
    candidate_position,
    candidate_score,
    columns_of_rows,
    compact,
    empty_result,
    likely_threshold,
    merge,
    place_rows,
    select,
)

SCORES = 1 << 28  # that exist at the same time where rows of them are selected from: 1 GiB


@triton.jit
def compact_rows(
    buffer_ptr, count_B, threshold_B, k, keep, most, queries, CAPACITY: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    """Compacts each row that holds more than `most` candidates to `keep` of them."""
    index_B = tl.arange(0, count_B.shape[0])
    for query in range(0, queries):
        count = tl.sum(tl.where(index_B == query, count_B, 0), 0)
        if count > most:
            tl.debug_barrier()
            count, threshold = compact(buffer_ptr + query * CAPACITY, count, k, keep, CAPACITY, R, W)
            count_B = tl.where(index_B == query, count, count_B)
            threshold_B = tl.where(index_B == query, threshold, threshold_B)
    return count_B, threshold_B


@triton.jit
def indexer_topk_kernel(
    q_ptr,
    k_ptr,
    k_tiles,  # k_ptr once more, or its tensor descriptor with blocks [M, D]
    weight_ptr,
    q_scale_ptr,
    k_scale_ptr,
    start_ptr,  # None: every range starts at 0
    end_ptr,
    chosen_ptr,  # None: all queries; else those with a number other than 0, nothing is written for others; B is 1 then
    table_ptr,  # page table [N, pages of a sequence]; None: keys lie in one piece
    sequence_ptr,
    out_score_ptr,  # [T, splits, K]; None: only positions are wanted
    out_position_ptr,
    out_row_ptr,  # of a paged cache with one split; None: not wanted
    length_ptr,  # None with several splits
    chunk_ptr,
    buffer_ptr,
    tokens,
    keys,
    splits,
    q_stride,
    k_stride,
    table_stride,
    sequences,
    pages,
    page_stride,
    scale_page_stride,
    k,
    limit,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    DIM: tl.constexpr,
    B: tl.constexpr,
    M: tl.constexpr,
    PAGE: tl.constexpr,
    STAGES: tl.constexpr,
    CAPACITY: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    SAMPLE: tl.constexpr,  # keys that a threshold is guessed from
    SIGMAS: tl.constexpr,
    PIECES: tl.constexpr,  # PIECES * 4 * R * W keys are scored at once
    UPCAST: tl.constexpr,
    DESCRIBED: tl.constexpr,
    GUESS_FROM: tl.constexpr,  # keys of a range from which on it is guessed
):
    PIECE: tl.constexpr = 4 * R * W
    CHUNK: tl.constexpr = PIECES * PIECE
    ROW_W: tl.constexpr = W // B if W > B else 1  # threads of a row where all rows pass together
    STEP: tl.constexpr = 4 * R * ROW_W
    UNROLL: tl.constexpr = 2 if B > 1 else 1  # independent steps, whose latencies overlap
    program = tl.program_id(0)
    index_B = tl.arange(0, B)
    chunk_ptr += program.to(tl.int64) * (B * CHUNK)
    buffer_ptr += program.to(tl.int64) * (B * CAPACITY)
    blocks = tl.cdiv(tokens, B)
    for task in range(program, blocks * splits, tl.num_programs(0)):
        # the last queries see the most keys in a causal batch: they go first
        token = (blocks - 1 - task // splits) * B
        start_B, end_B, present_B, low, high = block_range(start_ptr, end_ptr, token, tokens, keys, B)
        slots_out = k
        if chosen_ptr is not None:
            chosen = tl.load(chosen_ptr + token) != 0
            high = tl.where(chosen, high, low)
            slots_out = tl.where(chosen, k, 0)
        part = tl.cdiv(tl.cdiv(high - low, splits), M) * M
        low = tl.minimum(low + (task % splits) * part, high)
        high = tl.minimum(low + part, high)
        sequence_table_ptr = table_ptr
        if table_ptr is not None:
            sequence = tl.minimum(tl.maximum(tl.load(sequence_ptr + token), 0), sequences - 1)
            sequence_table_ptr = table_ptr + sequence.to(tl.int64) * table_stride
        q_ND = load_queries(q_ptr, token, tokens, q_stride, HEADS, P, DIM, B * P)
        weight_N = load_weights(weight_ptr, q_scale_ptr, token, tokens, HEADS, P, B * P)
        queries = tl.minimum(B, tokens - token)
        guess_B = tl.full([B], float("-inf"), tl.float32)
        if high - low >= GUESS_FROM:
            # every n-th key, so that clusters of good keys are met in proportion
            stride = (high - low) // SAMPLE
            score_range(
                chunk_ptr + index_B * SAMPLE, q_ND, weight_N, k_ptr, k_scale_ptr, k_stride, start_B, end_B, present_B,
                0, SAMPLE, keys, stride, low, sequence_table_ptr, pages, page_stride, scale_page_stride,
                B, P, DIM, M, PAGE, STAGES, UPCAST, False,
            )  # fmt: skip
            tl.debug_barrier()
            for query in range(0, queries):
                sample_C = tl.load(chunk_ptr + query * SAMPLE + tl.arange(0, SAMPLE))
                # a guess that is too high costs the whole block again: stay well below
                guess = likely_threshold(sample_C, k, high - low, SAMPLE, SIGMAS)
                guess_B = tl.where(index_B == query, guess, guess_B)
            tl.debug_barrier()
        count_B = tl.zeros([B], tl.int32)
        unfinished = True
        while unfinished:
            count_B = tl.zeros([B], tl.int32)
            threshold_B = guess_B
            for chunk in range(low, high, CHUNK):
                chunk_end = tl.minimum(chunk + CHUNK, high)
                score_range(
                    chunk_ptr + index_B * CHUNK - chunk, q_ND, weight_N, k_tiles, k_scale_ptr, k_stride, start_B,
                    end_B, present_B, chunk, chunk_end, keys, None, 0, sequence_table_ptr, pages,
                    page_stride, scale_page_stride, B, P, DIM, M, PAGE, STAGES, UPCAST, DESCRIBED,
                )  # fmt: skip
                tl.debug_barrier()
                place_WBRV, column_WBRV = columns_of_rows(B, R, ROW_W, CHUNK)
                next_WBRV = tl.load(chunk_ptr + place_WBRV)
                for piece in range(0, CHUNK, PIECE):
                    for first in range(piece, piece + PIECE, UNROLL * STEP):
                        for turn in tl.static_range(UNROLL):
                            score_WBRV = next_WBRV
                            here = first + turn * STEP
                            ahead = tl.minimum(here + STEP, CHUNK - STEP)
                            next_WBRV = tl.load(chunk_ptr + ahead + place_WBRV)
                            position_WBRV = chunk + here + column_WBRV
                            passes_WBRV = (score_WBRV > threshold_B[None, :, None, None]) & (position_WBRV < chunk_end)
                            passes_WBRV = passes_WBRV & (index_B < queries)[None, :, None, None]
                            count_B = place_rows(
                                buffer_ptr, count_B, score_WBRV, position_WBRV, passes_WBRV, R, CAPACITY
                            )
                    if tl.max(count_B, 0) + PIECE > CAPACITY:
                        count_B, threshold_B = compact_rows(
                            buffer_ptr, count_B, threshold_B, k, limit, CAPACITY - PIECE, queries, CAPACITY, R, W
                        )
                tl.debug_barrier()
            count_B, threshold_B = compact_rows(buffer_ptr, count_B, threshold_B, k, k, k, queries, CAPACITY, R, W)
            # a guess was too high: once more without
            failed_B = (count_B < k) & (guess_B > float("-inf"))
            unfinished = tl.sum(failed_B.to(tl.int32), 0) > 0
            guess_B = tl.full([B], float("-inf"), tl.float32)
        for query in range(0, queries):
            count = tl.sum(tl.where(index_B == query, count_B, 0), 0)
            out = ((token + query).to(tl.int64) * splits + task % splits) * k
            for first in range(0, slots_out, PIECE):
                slot_C = first + tl.arange(0, PIECE)
                candidate_C = tl.load(buffer_ptr + query * CAPACITY + slot_C)
                filled_C = slot_C < count
                position_C = tl.where(filled_C, candidate_position(candidate_C), -1)
                tl.store(out_position_ptr + out + slot_C, position_C, mask=slot_C < k)
                if out_row_ptr is not None:
                    page_C = tl.load(sequence_table_ptr + position_C // PAGE, mask=filled_C, other=0).to(tl.int32)
                    row_C = tl.where(filled_C, page_C * PAGE + position_C % PAGE, -1)
                    tl.store(out_row_ptr + out + slot_C, row_C, mask=slot_C < k)
                if out_score_ptr is not None:
                    part_score_C = tl.where(filled_C, candidate_score(candidate_C), float("-inf"))
                    tl.store(out_score_ptr + out + slot_C, part_score_C, mask=slot_C < k)
            if length_ptr is not None:
                tl.store(length_ptr + token + query, count, mask=slots_out > 0)
        tl.debug_barrier()


def launch(
    q_THD: Tensor,
    k_tensor: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor | None,
    key_end_T: Tensor,
    k: int,
    q_scale_TH: Tensor | None = None,
    k_scale: Tensor | None = None,
    page_table_NP: Tensor | None = None,
    sequence_T: Tensor | None = None,
    shape: dict[str, int] | None = None,
    splits: int | None = None,
    sizes: dict[str, int] | None = None,
    per_processor: int = 2,
    described: bool | None = None,
    guess_from: int | None = None,
    sample: int | None = None,
    sigmas: float | None = None,
    pieces: int = 2,
    chosen_T: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(positions_TK, lengths_T). `k_tensor` is k_SD, or with a page table the cache [pages, page size, D].
    `chosen_T` int32 (paged, one split): tokens with a 0 are left alone in `out`: positions, lengths and cache rows.

    Of a paged cache one program serves one token: tokens of a block would need one page table.
    """
    tokens, heads, dim = q_THD.shape
    device = q_THD.device
    position_TK, length_T, row_TK = out or (*empty_result(tokens, k, device), None)
    if tokens == 0 or k_tensor.shape[0] == 0:
        return position_TK.fill_(-1), length_T.zero_()
    if q_THD.stride(1) != dim:
        q_THD = q_THD.contiguous()
    paged = page_table_NP is not None
    options = shape or tile_shape(q_THD, paged)
    sizes = sizes or buffer_sizes(k, options["num_warps"], roomy=True)
    capacity, chunk = sizes["CAPACITY"], 4 * sizes["R"] * sizes["W"]
    # decoding reads each key once, and every key of the sample twice; a guess that fails costs it one query, not a
    # block of them
    sample = sample or (chunk // 4 if paged else chunk)
    sigmas = sigmas or (4.0 if paged else 7.0)
    page_size = k_tensor.shape[1] if paged else 1
    described = not paged and describable(k_tensor) if described is None else described
    keys = page_table_NP.shape[1] * page_size if page_table_NP is not None else k_tensor.shape[0]
    blocks = triton.cdiv(tokens, options["B"])
    slots = per_processor * processors(device)
    if splits is None:
        splits = max(1, min(slots // blocks, keys // (2 * capacity)))
    programs = min(blocks * splits, slots)
    scratch_rows = programs * options["B"]
    part_score = torch.empty(tokens, splits * k, dtype=torch.float32, device=device) if splits > 1 else None
    part_position = torch.empty(tokens, splits * k, dtype=torch.int32, device=device) if splits > 1 else position_TK
    indexer_topk_kernel[(programs,)](
        q_THD,
        k_tensor,
        TensorDescriptor.from_tensor(k_tensor, [options["M"], dim]) if described else k_tensor,
        weight_TH,
        q_scale_TH,
        k_scale,
        key_start_T,
        key_end_T,
        chosen_T,
        page_table_NP,
        sequence_T,
        part_score,
        part_position,
        row_TK,
        None if splits > 1 else length_T,
        torch.empty(scratch_rows, pieces * chunk, dtype=torch.float32, device=device),
        torch.empty(scratch_rows, capacity, dtype=torch.int64, device=device),
        tokens,
        keys,
        splits,
        q_THD.stride(0),
        k_tensor.stride(-2),
        page_table_NP.stride(0) if page_table_NP is not None else 0,
        page_table_NP.shape[0] if page_table_NP is not None else 1,
        k_tensor.shape[0],
        k_tensor.stride(0) if paged else 0,
        k_scale.stride(0) if paged and k_scale is not None else 0,
        k,
        min(k + k // 4, capacity - chunk),
        HEADS=heads,
        P=padded_heads(heads),
        DIM=dim,
        PAGE=page_size,
        UPCAST=INTERPRETED,
        DESCRIBED=described,
        GUESS_FROM=8 * chunk if guess_from is None else guess_from,
        SAMPLE=sample,
        SIGMAS=sigmas,
        PIECES=pieces,
        **sizes,
        **options,
    )
    if part_score is not None:
        return merge(part_score, k, part_position)
    return position_TK, length_T


def by_rows(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    q_scale_TH: Tensor | None = None,
    k_scale_S: Tensor | None = None,
    scores: int = SCORES,
    shape: dict[str, int] | None = None,
    sizes: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The same by two kernels, scores and top-k, some queries after the others, so that at most `scores` scores exist.

    Where the queries fill the card this is the faster way: the passing of rows costs the fused kernel more time of the
    tensor cores than it costs memory to take the scores there and back."""
    rows = max(1, scores // k_SD.shape[0])
    hopper = hopper_kernel(q_THD, k_SD)
    parts = []
    for first in range(0, q_THD.shape[0], rows):
        here = slice(first, first + rows)
        part_scale_TH = None if q_scale_TH is None else q_scale_TH[here]
        scores_TS = score_rows(
            q_THD[here], k_SD, weight_TH[here], key_start_T[here], key_end_T[here], part_scale_TH, k_scale_S, shape,
            fill=False, hopper=hopper,
        )  # fmt: skip
        parts.append(select(scores_TS, k, sizes=sizes, range_T=(key_start_T[here], key_end_T[here])))
    if len(parts) == 1:
        return parts[0]
    return torch.cat([positions_TK for positions_TK, _ in parts]), torch.cat([lengths_T for _, lengths_T in parts])


@torch.library.custom_op("sparseline::indexer_topk", mutates_args=())
def indexer_topk(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    q_scale_TH: Tensor | None = None,
    k_scale_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `kernels.indexer_topk.indexer_topk`; fp32, bf16, fp16 or e4m3."""
    q_scale_TH = q_scale_TH.float().contiguous() if q_scale_TH is not None else None
    k_scale_S = k_scale_S.float() if k_scale_S is not None else None
    weight_TH = weight_TH.contiguous()
    fills = q_THD.shape[0] >= 2 * tile_shape(q_THD)["B"] * processors(q_THD.device)
    if hopper_kernel(q_THD, k_SD):
        from kernels.indexer_topk import gluon

        if gluon.pays(k_SD.shape[0], k):
            return gluon.by_threshold(q_THD, k_SD, weight_TH, key_start_T, key_end_T, k, q_scale_TH, k_scale_S)
    run = by_rows if fills and k_SD.shape[0] > 0 else launch
    return run(q_THD, k_SD, weight_TH, key_start_T, key_end_T, k, q_scale_TH, k_scale_S)


@indexer_topk.register_fake
def _(q_THD, k_SD, weight_TH, key_start_T, key_end_T, k, q_scale_TH=None, k_scale_S=None):
    tokens = q_THD.shape[0]
    return q_THD.new_empty(tokens, k, dtype=torch.int32), q_THD.new_empty(tokens, dtype=torch.int32)
