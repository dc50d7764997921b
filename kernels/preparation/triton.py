"""LayerNorm, RoPE, quantisation and cache write in one pass over the rows.

Legend: T tokens, H heads, D head dim, F rope frequencies; in a program R rows (a row is one head of one token).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def prepare_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    norm_weight_ptr,  # None: no LayerNorm
    norm_bias_ptr,
    out_ptr,
    scale_ptr,  # None: out keeps x's dtype
    row_ptr,  # None: rows come out in order; else the cache row of each, negative: not written
    rows,
    cache_rows,
    heads,
    page_size,  # cache rows of a page
    page_stride,
    out_stride,
    scale_page_stride,
    token_stride,
    frequency_stride,
    eps,
    DIM: tl.constexpr,
    D: tl.constexpr,  # DIM padded to a power of two
    F: tl.constexpr,
    R: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROPE_FIRST: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    present_R = row_R < rows
    token_R = (row_R // heads).to(tl.int64)
    base_R = token_R * token_stride + (row_R % heads) * DIM
    column_D = tl.arange(0, D)
    inside_RD = present_R[:, None] & (column_D < DIM)[None, :]
    x_RD = tl.load(x_ptr + base_R[:, None] + column_D[None, :], mask=inside_RD, other=0.0).to(tl.float32)
    # the other member of each rotated pair
    OFFSET: tl.constexpr = 0 if ROPE_FIRST else DIM - 2 * F
    place_D = column_D - OFFSET
    rotated_D = (place_D >= 0) & (place_D < 2 * F)
    if INTERLEAVED:
        second_D = place_D % 2 == 1
        frequency_D = place_D // 2
        partner_D = tl.where(second_D, column_D - 1, column_D + 1)
    else:
        second_D = place_D >= F
        frequency_D = tl.where(second_D, place_D - F, place_D)
        partner_D = tl.where(second_D, column_D - F, column_D + F)
    rotated_RD = present_R[:, None] & rotated_D[None, :]
    partner_RD = tl.load(x_ptr + base_R[:, None] + partner_D[None, :], mask=rotated_RD, other=0.0).to(tl.float32)
    if norm_weight_ptr is not None:
        mean_R = tl.sum(x_RD, 1) / DIM
        centred_RD = tl.where(inside_RD, x_RD - mean_R[:, None], 0.0)
        inverse_R = 1.0 / tl.sqrt(tl.sum(centred_RD * centred_RD, 1) / DIM + eps)
        weight_D = tl.load(norm_weight_ptr + column_D, mask=column_D < DIM, other=0.0).to(tl.float32)
        bias_D = tl.load(norm_bias_ptr + column_D, mask=column_D < DIM, other=0.0).to(tl.float32)
        partner_weight_D = tl.load(norm_weight_ptr + partner_D, mask=rotated_D, other=0.0).to(tl.float32)
        partner_bias_D = tl.load(norm_bias_ptr + partner_D, mask=rotated_D, other=0.0).to(tl.float32)
        x_RD = centred_RD * inverse_R[:, None] * weight_D[None, :] + bias_D[None, :]
        partner_RD = (partner_RD - mean_R[:, None]) * inverse_R[:, None] * partner_weight_D + partner_bias_D[None, :]
    frequency_RD = token_R[:, None] * frequency_stride + frequency_D[None, :]
    cos_RD = tl.load(cos_ptr + frequency_RD, mask=rotated_RD, other=1.0).to(tl.float32)
    sin_RD = tl.load(sin_ptr + frequency_RD, mask=rotated_RD, other=0.0).to(tl.float32)
    turned_RD = x_RD * cos_RD + tl.where(second_D[None, :], partner_RD, -partner_RD) * sin_RD
    y_RD = tl.where(rotated_RD, turned_RD, x_RD)

    if row_ptr is None:
        target_R = row_R.to(tl.int64)
        written_R = present_R
    else:
        target_R = tl.load(row_ptr + row_R, mask=present_R, other=-1).to(tl.int64)
        written_R = present_R & (target_R >= 0) & (target_R < cache_rows)
    page_R = target_R // page_size
    offset_R = target_R % page_size
    if scale_ptr is not None:
        amax_R = tl.maximum(tl.max(tl.abs(tl.where(inside_RD, y_RD, 0.0)), 1), 1e-4)
        scale_R = tl.div_rn(amax_R, 448.0)
        if POWER_OF_TWO:
            bits_R = scale_R.to(tl.int32, bitcast=True)
            bits_R = ((bits_R >> 23) + tl.where((bits_R & 0x7FFFFF) != 0, 1, 0)) << 23
            scale_R = bits_R.to(tl.float32, bitcast=True)
        tl.store(scale_ptr + page_R * scale_page_stride + offset_R, scale_R, mask=written_R)
        y_RD = tl.div_rn(y_RD, tl.broadcast_to(scale_R[:, None], [R, D]))
        y_RD = tl.minimum(tl.maximum(y_RD, -448.0), 448.0)
    target_RD = (page_R * page_stride + offset_R * out_stride)[:, None] + column_D[None, :]
    tl.store(out_ptr + target_RD, y_RD.to(out_ptr.dtype.element_ty), mask=written_R[:, None] & inside_RD)


def launch(
    x_THD: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    eps: float,
    interleaved: bool,
    rope_first: bool,
    power_of_two: bool,
    out_PSD: Tensor,
    scale_PS: Tensor | None,
    row_T: Tensor | None,
) -> None:
    """Writes to out_PSD [pages, page size, D] (pages of one row each: plain output) and its scales."""
    tokens, heads, dim = x_THD.shape
    rows = tokens * heads
    if rows == 0:
        return
    if x_THD.stride(1) != dim:
        x_THD = x_THD.contiguous()
    block = max(1, 2048 // triton.next_power_of_2(dim))
    prepare_kernel[(triton.cdiv(rows, block),)](
        x_THD,
        cos_TF,
        sin_TF,
        norm_weight_D,
        norm_bias_D,
        out_PSD,
        scale_PS,
        row_T,
        rows,
        out_PSD.shape[0] * out_PSD.shape[1],
        heads,
        out_PSD.shape[1],
        out_PSD.stride(0),
        out_PSD.stride(1),
        scale_PS.stride(0) if scale_PS is not None else 0,
        x_THD.stride(0),
        cos_TF.stride(0),
        eps,
        DIM=dim,
        D=triton.next_power_of_2(dim),
        F=cos_TF.shape[1],
        R=block,
        INTERLEAVED=interleaved,
        ROPE_FIRST=rope_first,
        POWER_OF_TWO=power_of_two,
        num_warps=4,
    )


@torch.library.custom_op("sparseline::prepare", mutates_args=())
def prepare(
    x_THD: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    eps: float,
    interleaved: bool,
    rope_first: bool,
    fp8: bool,
    power_of_two: bool,
) -> tuple[Tensor, Tensor]:
    """See `kernels.preparation.prepare`; without fp8 the scale is empty."""
    tokens, heads, dim = x_THD.shape
    dtype = torch.float8_e4m3fn if fp8 else x_THD.dtype
    y_THD = torch.empty(tokens, heads, dim, dtype=dtype, device=x_THD.device)
    scale_TH = torch.empty(tokens, heads if fp8 else 0, dtype=torch.float32, device=x_THD.device)
    launch(
        x_THD,
        cos_TF,
        sin_TF,
        norm_weight_D,
        norm_bias_D,
        eps,
        interleaved,
        rope_first,
        power_of_two,
        y_THD.view(tokens * heads, 1, dim),
        scale_TH.view(tokens * heads, 1) if fp8 else None,
        None,
    )
    return y_THD, scale_TH


@prepare.register_fake
def _(x_THD, cos_TF, sin_TF, norm_weight_D, norm_bias_D, eps, interleaved, rope_first, fp8, power_of_two):
    y_THD = torch.empty(x_THD.shape, dtype=torch.float8_e4m3fn if fp8 else x_THD.dtype, device=x_THD.device)
    return y_THD, x_THD.new_empty(x_THD.shape[0], x_THD.shape[1] if fp8 else 0, dtype=torch.float32)


@torch.library.custom_op("sparseline::prepare_into_cache", mutates_args=("cache_PSD", "cache_scale_PS"))
def prepare_into_cache(
    x_TD: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    eps: float,
    interleaved: bool,
    rope_first: bool,
    power_of_two: bool,
    cache_PSD: Tensor,
    cache_scale_PS: Tensor | None,
    row_T: Tensor,
) -> None:
    """See `kernels.preparation.prepare_into_cache`."""
    launch(
        x_TD[:, None],
        cos_TF,
        sin_TF,
        norm_weight_D,
        norm_bias_D,
        eps,
        interleaved,
        rope_first,
        power_of_two,
        cache_PSD,
        cache_scale_PS,
        row_T,
    )


@prepare_into_cache.register_fake
def _(*_arguments):
    return None
