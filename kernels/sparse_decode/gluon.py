"""Sparse attention over the 656-byte fp8 rows for Hopper in Gluon, where tokens and heads fill the card.

The consumers and their schedule are those of `kernels.sparse_attention.gluon`. Here the producer turns e4m3 into bf16
on the way: it loads tile after tile into registers, three ahead, multiplies by the scale of each 128 values, and
stores what the products read. So the selected rows never exist unpacked in device memory.

Legend: T query tokens, S cache rows, K selected rows, H heads, M = 64 heads of a tile, N = 64 rows of a block.
"""

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernels.launch import processors
from kernels.sparse_attention.gluon import (
    PRODUCER_WARPS,
    _allocate,
    _block_indices,
    _consumer,
    _load_queries,
    span_kernel,
    thread_barrier,
)

TILE = gl.constexpr(32)  # words of four values that share a scale
# a warp loads 64 bytes of 8 rows at once: few row addresses and scales a thread, whole memory sectors
WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
# the tiles of shared memory as words of two bf16; the swizzle is of bytes and stays the same
WIDE_WORDS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=32, rank=2))


@gluon.jit
def _rows(index_N, stand_in, key_rows):
    """An index that is no row reads a row that the token did select; the consumers mask its score."""
    valid_N = (index_N >= 0) & (index_N < key_rows)
    return gl.where(valid_N, index_N, stand_in).to(gl.int64)


@gluon.jit
def _load(word_ptr, scale_ptr, row_N, tile: gl.constexpr):
    """A tile of each row, with its scale. Words: single bytes would take a register each."""
    column_D = tile * TILE + gl.arange(0, TILE, gl.SliceLayout(0, WORDS))
    words = gl.load(word_ptr + gl.expand_dims(row_N * 164, 1) + gl.expand_dims(column_D, 0))
    return words, gl.load(scale_ptr + row_N * 164 + (128 + tile))


@gluon.jit
def _as_bf16(words, scale_N):
    """[N, D words of four e4m3] times a scale a row -> [N, 2 D words of two bf16]."""
    scale = gl.expand_dims(scale_N, 1).broadcast_to(words.shape)
    low, high = gl.inline_asm_elementwise(
        """
        {
        .reg .b16 half0, half1, h0, h1, h2, h3;
        .reg .b32 pair0, pair1;
        .reg .f32 f0, f1, f2, f3;
        mov.b32 {half0, half1}, $2;
        cvt.rn.f16x2.e4m3x2 pair0, half0;
        cvt.rn.f16x2.e4m3x2 pair1, half1;
        mov.b32 {h0, h1}, pair0;
        mov.b32 {h2, h3}, pair1;
        cvt.f32.f16 f0, h0;
        cvt.f32.f16 f1, h1;
        cvt.f32.f16 f2, h2;
        cvt.f32.f16 f3, h3;
        mul.f32 f0, f0, $3;
        mul.f32 f1, f1, $3;
        mul.f32 f2, f2, $3;
        mul.f32 f3, f3, $3;
        cvt.rn.bf16x2.f32 $0, f1, f0;
        cvt.rn.bf16x2.f32 $1, f3, f2;
        }
        """,
        "=r,=r,r,f",
        [words, scale],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return gl.reshape(gl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@gluon.jit
def _store(destination, tile):
    """A tile into a quarter."""
    words, scale_N = tile
    destination._reinterpret(gl.int32, [64, 2 * TILE], WIDE_WORDS).store(_as_bf16(words, scale_N))


@gluon.jit
def _announce(left, right):
    """Two quarters that all warps have stored."""
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(left, count=1)
    mbarrier.arrive(right, count=1)


@gluon.jit
def _load_rope(word_ptr, row_N):
    column_D = 132 + gl.arange(0, 32, gl.SliceLayout(0, WORDS))
    return gl.load(word_ptr + gl.expand_dims(row_N * 164, 1) + gl.expand_dims(column_D, 0))


@gluon.jit
def _producer(
    memory, barriers, q_ptr, word_ptr, scale_ptr, indices_ptr, span_ptr, tiles, key_rows, q_stride_t,
    q_stride_h, indices_stride, KEYS: gl.constexpr, ROW_BLOCKS: gl.constexpr,
):  # fmt: skip
    q, q_rest, keys, rest = memory
    q_ready, q_free, ready, free, _, _ = barriers
    pairs_done = 0
    tiles_done = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        token = (tile // ROW_BLOCKS).to(gl.int64)
        row_indices = indices_ptr + token * indices_stride
        span = gl.load(span_ptr + 3 * token)
        pairs = (gl.maximum(span, -1 - span) + 127) // 128
        stand_in = gl.load(span_ptr + 3 * token + 1)
        row_N = _rows(_block_indices(row_indices, 0, KEYS, WORDS), stand_in, key_rows)
        index_N = _block_indices(row_indices, 64, KEYS, WORDS)

        mbarrier.wait(q_free, (tiles_done & 1) ^ 1)
        _load_queries(q, q_rest, q_ptr, tile, q_stride_t, q_stride_h, ROW_BLOCKS, True)
        async_copy.mbarrier_arrive(q_ready, increment_count=False)

        # a token without rows has row 0 as its stand-in: the loads before the loop are in range for every token
        own_left = _load(word_ptr, scale_ptr, row_N, 0)
        own_right = _load(word_ptr, scale_ptr, row_N, 1)
        other_left = _load(word_ptr, scale_ptr, row_N, 2)
        for pair in range(pairs):
            phase = (pairs_done & 1) ^ 1
            for block in gl.static_range(2):
                # the quarters in the values of the group that scores the block: 6 * block and the next
                mbarrier.wait(free.index(6 * block), phase)
                mbarrier.wait(free.index(6 * block + 1), phase)
                _store(keys.index(6 * block), own_left)
                other_right = _load(word_ptr, scale_ptr, row_N, 3 - 2 * block)
                _store(keys.index(6 * block + 1), own_right)
                rope = _load_rope(word_ptr, row_N)
                _announce(ready.index(6 * block), ready.index(6 * block + 1))
                # the halves of the next block are the other way round
                row_N = _rows(index_N, stand_in, key_rows)
                index_N = _block_indices(row_indices, pair * 128 + block * 64 + 128, KEYS, WORDS)
                mbarrier.wait(free.index(2 * block + 2), phase)
                mbarrier.wait(free.index(2 * block + 3), phase)
                _store(keys.index(2 * block + 2), other_left)
                own_left = _load(word_ptr, scale_ptr, row_N, 2 - 2 * block)
                _store(keys.index(2 * block + 3), other_right)
                own_right = _load(word_ptr, scale_ptr, row_N, 3 - 2 * block)
                rest.index(block)._reinterpret(gl.int32, [64, 32], WIDE_WORDS).store(rope)
                other_left = _load(word_ptr, scale_ptr, row_N, 2 * block)
                _announce(ready.index(2 * block + 2), ready.index(2 * block + 3))
            pairs_done += 1
        tiles_done += 1  # noqa: SIM113


@gluon.jit
def sparse_decode_hopper_kernel(
    q_ptr, word_ptr, scale_ptr, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tiles, key_rows,
    scale_log2, q_stride_t, q_stride_h, indices_stride, nought, KEYS: gl.constexpr, HEADS: gl.constexpr,
    ROW_BLOCKS: gl.constexpr, HAS_SINK: gl.constexpr,
):  # fmt: skip
    memory, exchange, barriers = _allocate(q_ptr.dtype.element_ty, 1)
    gl.warp_specialize(
        [
            (_consumer, (
                memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tiles, key_rows,
                scale_log2, indices_stride, nought, KEYS, HEADS, ROW_BLOCKS, True, HAS_SINK, gl.constexpr(0),
            )),
            (_consumer, (
                memory, exchange, barriers, indices_ptr, span_ptr, sink_ptr, out_ptr, lse_ptr, tiles, key_rows,
                scale_log2, indices_stride, nought, KEYS, HEADS, ROW_BLOCKS, True, HAS_SINK, gl.constexpr(1),
            )),
            (_producer, (
                memory, barriers, q_ptr, word_ptr, scale_ptr, indices_ptr, span_ptr, tiles, key_rows,
                q_stride_t, q_stride_h, indices_stride, KEYS, ROW_BLOCKS,
            )),
        ],
        [4, PRODUCER_WARPS],
        [200, 104],
    )  # fmt: skip


def supports(heads: int, target: tuple[int, int]) -> bool:
    return target == (9, 0) and heads % 64 == 0


def sparse_decode_fp8(
    q_THD: torch.Tensor, cache_RB: torch.Tensor, rows_TK: torch.Tensor, scale: float, sink_H: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel where `supports` says so; cache_RB [rows, 656] uint8."""
    (tokens, heads, _), keys = q_THD.shape, rows_TK.shape[1]
    out_THV = q_THD.new_empty(tokens, heads, 512)
    lse_TH = q_THD.new_empty(tokens, heads, dtype=torch.float32)
    span_T3 = torch.empty(tokens, 3, dtype=torch.int32, device=q_THD.device)
    span_kernel[(tokens,)](
        rows_TK, span_T3, cache_RB.shape[0], rows_TK.stride(0), KEYS=keys, KEYS_PADDED=triton.next_power_of_2(keys)
    )
    tiles = tokens * (heads // 64)
    sparse_decode_hopper_kernel[(min(tiles, processors(q_THD.device)),)](
        q_THD,
        cache_RB.view(torch.int32),
        cache_RB.view(torch.float32),
        rows_TK,
        span_T3,
        sink_H,
        out_THV,
        lse_TH,
        tiles,
        cache_RB.shape[0],
        scale * math.log2(math.e),
        q_THD.stride(0),
        q_THD.stride(1),
        rows_TK.stride(0),
        0,
        KEYS=keys,
        HEADS=heads,
        ROW_BLOCKS=heads // 64,
        HAS_SINK=sink_H is not None,
        num_warps=4,
    )
    return out_THV, lse_TH
