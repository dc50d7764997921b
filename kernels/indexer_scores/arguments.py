"""Argument checks that the scores, fused and paged operations share, and what the GPU kernels accept.

Legend: T query tokens, H indexer heads, D head dim.
"""

import torch
from torch import Tensor

from kernels import checks
from kernels.launch import capability

FP8 = torch.float8_e4m3fn
MAX_HEADS = 128
GPU_HEAD_DIMS = (16, 32, 64, 128, 256)


def check_queries(
    q_THD: Tensor, k_tensor: Tensor, weight_TH: Tensor, q_scale_TH: Tensor | None, k_scale: Tensor | None
) -> None:
    """`k_tensor` is k_SD or k_cache_PSD, and `k_scale` its factors: one per key."""
    checks.check_shape("q_THD", q_THD, None, None, None)
    tokens, heads, dim = q_THD.shape
    key_name, scale_name = ("k_SD", "k_scale_S") if k_tensor.dim() == 2 else ("k_cache_PSD", "k_scale_PS")
    checks.check_shape(key_name, k_tensor, *[None] * (3 if key_name == "k_cache_PSD" else 2))
    if k_tensor.shape[-1] != dim:
        raise ValueError(f"{key_name}: shape {list(k_tensor.shape)} was given, [..., {dim}] is accepted (D of q_THD)")
    if not 1 <= heads <= MAX_HEADS:
        raise ValueError(f"q_THD: {heads} heads were given, 1..{MAX_HEADS} are accepted")
    checks.check_shape("weight_TH", weight_TH, tokens, heads)
    for name, tensor in (("q_THD", q_THD), (key_name, k_tensor)):
        checks.check_dtype(name, tensor, (*checks.FLOATS, FP8))
        checks.check_inner_contiguous(name, tensor)
    checks.check_same("dtype", **{"q_THD": q_THD, key_name: k_tensor})
    checks.check_dtype("weight_TH", weight_TH, checks.FLOATS)
    checks.check_same("device", **{"q_THD": q_THD, key_name: k_tensor, "weight_TH": weight_TH})
    if q_scale_TH is not None:
        checks.check_shape("q_scale_TH", q_scale_TH, tokens, heads)
        checks.check_dtype("q_scale_TH", q_scale_TH, (torch.float32, torch.float64))
        checks.check_same("device", q_THD=q_THD, q_scale_TH=q_scale_TH)
    if k_scale is not None:
        checks.check_shape(scale_name, k_scale, *k_tensor.shape[:-1])
        checks.check_dtype(scale_name, k_scale, (torch.float32, torch.float64))
        checks.check_inner_contiguous(scale_name, k_scale)
        checks.check_same("device", **{"q_THD": q_THD, scale_name: k_scale})
    if q_THD.is_cuda:
        check_gpu(q_THD)


def check_gpu(q_THD: Tensor) -> None:
    if q_THD.dtype == torch.float64:
        raise ValueError("q_THD: dtype torch.float64 was given, a GPU accepts fp32, bf16, fp16 and float8_e4m3fn")
    smallest = 32 if q_THD.dtype == FP8 else 16
    dims = [dim for dim in GPU_HEAD_DIMS if dim >= smallest]
    if q_THD.shape[2] not in dims:
        raise ValueError(f"q_THD: head dim {q_THD.shape[2]} was given, a GPU accepts {dims} for {q_THD.dtype}")
    if q_THD.dtype == FP8 and capability(q_THD.device) < (8, 9):
        major, minor = capability(q_THD.device)
        raise ValueError(f"q_THD: fp8 was given on sm_{major}{minor}, it needs sm_89 or later; use bf16 here")


def check_key_ranges(q_THD: Tensor, k_SD: Tensor, key_start_T: Tensor, key_end_T: Tensor) -> None:
    """On a GPU the values are not read (that would wait for the stream): kernels cut the ranges to the keys there."""
    checks.check_same("device", q_THD=q_THD, key_start_T=key_start_T, key_end_T=key_end_T)
    if not q_THD.is_cuda:
        checks.check_ranges(key_start_T, key_end_T, q_THD.shape[0], k_SD.shape[0])
        return
    for name, values in (("key_start_T", key_start_T), ("key_end_T", key_end_T)):
        checks.check_shape(name, values, q_THD.shape[0])
        checks.check_dtype(name, values, checks.INDICES)


def check_slots(k: int) -> None:
    from kernels.topk import MAX_SLOTS

    if not 1 <= k <= MAX_SLOTS:
        raise ValueError(f"k: {k} was given, 1..{MAX_SLOTS} is accepted")
