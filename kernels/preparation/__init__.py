"""What happens to the indexer's queries and keys between their projection and the scores: LayerNorm (keys), RoPE,
quantisation, cache write."""

import torch
from torch import Tensor

from kernels import checks
from kernels.launch import capability
from kernels.preparation import reference

FP8 = reference.FP8


def prepare(
    x_THD: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    *,
    norm_weight_D: Tensor | None = None,
    norm_bias_D: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    rope_first: bool = True,
    fp8: bool = False,
    power_of_two: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm over D (with norm_weight_D and norm_bias_D), then RoPE, then with `fp8` quantisation per row.

    Args:
        x_THD: projected queries, or keys as H = 1: [T, H, D], a float dtype.
        cos_TF, sin_TF: of each token's rotation, F = half the rotated columns, one dtype of both.
        interleaved: rotated pairs are (2i, 2i+1) (GLM's indexer), else (i, i + F) (DeepSeek's indexer since
            2025-11-17).
        rope_first: the rotated columns are the first 2F (the indexer's layout), else the last (MLA's).
        power_of_two: scales are rounded up to powers of two (ue8m0, as DeepSeek-V3.2's published act_quant).

    Returns:
        y_THD in x's dtype and None; with `fp8` e4m3 and scale_TH fp32, where x = y * scale. No gradient on a GPU.

    Raises:
        ValueError: on wrong shapes, dtypes, devices or strides, and fp8 on a GPU before sm_89.
    """
    checks.check_shape("x_THD", x_THD, None, None, None)
    _check(x_THD, cos_TF, sin_TF, norm_weight_D, norm_bias_D, fp8)
    if not x_THD.is_cuda:
        return reference.prepare(
            x_THD, cos_TF, sin_TF, norm_weight_D, norm_bias_D, eps, interleaved, rope_first, fp8, power_of_two
        )
    from kernels.preparation import triton

    y_THD, scale_TH = triton.prepare(
        *(t.detach() if t is not None else None for t in (x_THD, cos_TF, sin_TF, norm_weight_D, norm_bias_D)),
        eps,
        interleaved,
        rope_first,
        fp8,
        power_of_two,
    )
    return y_THD, scale_TH if fp8 else None


def prepare_into_cache(
    x_TD: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    cache_PSD: Tensor,
    cache_scale_PS: Tensor | None,
    row_T: Tensor,
    *,
    norm_weight_D: Tensor | None = None,
    norm_bias_D: Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    rope_first: bool = True,
    power_of_two: bool = True,
) -> None:
    """`prepare` of one key per token, written in place to cache row row_T (page * page size + offset; -1: nowhere).

    cache_PSD [pages, page size, D] is of x's dtype with cache_scale_PS None, or e4m3 with cache_scale_PS fp32 [pages,
    page size]. Raises ValueError as `prepare`, and on a CPU for rows out of range (a GPU writes nothing for those).
    """
    checks.check_shape("x_TD", x_TD, None, None)
    tokens, dim = x_TD.shape
    fp8 = cache_scale_PS is not None
    _check(x_TD[:, None], cos_TF, sin_TF, norm_weight_D, norm_bias_D, fp8)
    checks.check_shape("cache_PSD", cache_PSD, None, None, dim)
    checks.check_inner_contiguous("cache_PSD", cache_PSD)
    checks.check_dtype("cache_PSD", cache_PSD, (FP8 if fp8 else x_TD.dtype,))
    checks.check_shape("row_T", row_T, tokens)
    checks.check_dtype("row_T", row_T, checks.INDICES)
    checks.check_same("device", x_TD=x_TD, cache_PSD=cache_PSD, row_T=row_T)
    if cache_scale_PS is not None:
        checks.check_shape("cache_scale_PS", cache_scale_PS, *cache_PSD.shape[:2])
        checks.check_inner_contiguous("cache_scale_PS", cache_scale_PS)
        checks.check_dtype("cache_scale_PS", cache_scale_PS, (torch.float32,))
        checks.check_same("device", x_TD=x_TD, cache_scale_PS=cache_scale_PS)
    if x_TD.is_cuda:
        from kernels.preparation import triton

        triton.prepare_into_cache(
            *(t.detach() if t is not None else None for t in (x_TD, cos_TF, sin_TF, norm_weight_D, norm_bias_D)),
            eps,
            interleaved,
            rope_first,
            power_of_two,
            cache_PSD,
            cache_scale_PS,
            row_T,
        )
        return
    page_size = cache_PSD.shape[1]
    checks.check_indices("row_T", row_T, cache_PSD.shape[0] * page_size)
    y_T1D, scale_T1 = reference.prepare(
        x_TD[:, None], cos_TF, sin_TF, norm_weight_D, norm_bias_D, eps, interleaved, rope_first, fp8, power_of_two
    )
    kept = row_T >= 0
    page, offset = row_T[kept].long() // page_size, row_T[kept].long() % page_size
    cache_PSD[page, offset] = y_T1D[kept, 0].detach()
    if cache_scale_PS is not None and scale_T1 is not None:
        cache_scale_PS[page, offset] = scale_T1[kept, 0]


def _check(
    x_THD: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    fp8: bool,
) -> None:
    tokens, _, dim = x_THD.shape
    checks.check_dtype("x", x_THD, checks.FLOATS)
    checks.check_inner_contiguous("x", x_THD)
    checks.check_shape("cos_TF", cos_TF, tokens, None)
    checks.check_shape("sin_TF", sin_TF, *cos_TF.shape)
    given: dict[str, Tensor] = {"x": x_THD, "cos_TF": cos_TF, "sin_TF": sin_TF}
    if not 0 < 2 * cos_TF.shape[1] <= dim:
        raise ValueError(f"cos_TF: {cos_TF.shape[1]} frequencies were given, 1..{dim // 2} are accepted")
    if cos_TF.stride() != sin_TF.stride() or cos_TF.stride(1) != 1:
        raise ValueError(f"cos_TF, sin_TF: strides {cos_TF.stride()}, {sin_TF.stride()} were given, equal ones ending "
                         "in 1 are accepted")  # fmt: skip
    if (norm_weight_D is None) != (norm_bias_D is None):
        raise ValueError("norm_weight_D, norm_bias_D: one of them was given, both or none are accepted")
    if norm_weight_D is not None and norm_bias_D is not None:
        given |= {"norm_weight_D": norm_weight_D, "norm_bias_D": norm_bias_D}
        for name in ("norm_weight_D", "norm_bias_D"):
            checks.check_shape(name, given[name], dim)
            checks.check_inner_contiguous(name, given[name])
    checks.check_same("device", **given)
    if x_THD.is_cuda and x_THD.dtype == torch.float64:
        raise ValueError("x: dtype torch.float64 was given, a GPU accepts fp32, bf16 and fp16")
    if x_THD.is_cuda and fp8 and capability(x_THD.device) < (8, 9):
        raise ValueError("fp8: this GPU has no e4m3 (sm_89 and later have it); keep bf16 here")
