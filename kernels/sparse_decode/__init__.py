"""Sparse attention while decoding: few query tokens over a paged cache, split over the selected rows.

Rows are global cache rows, page * page size + offset, as `kernels.paged_indexer_topk` returns them. On a CPU the
PyTorch reference runs; on an NVIDIA GPU split-K kernels with a deterministic combination. No gradient.

Legend: T query tokens (several of one sequence allowed), H query heads, G key-value heads, K selected rows, P pages,
S rows of a page, D key width, V value width, B = 656 bytes of a quantised latent row.
"""

import torch

from kernels import checks
from kernels.launch import capability
from kernels.sparse_attention import MAX_KEYS
from kernels.sparse_decode import reference
from kernels.sparse_decode.operator import sparse_decode_forward, sparse_decode_fp8_forward
from kernels.sparse_decode.reference import ROW_BYTES, pack_latent, unpack_latent

__all__ = ["ROW_BYTES", "pack_latent", "sparse_decode", "sparse_decode_gqa", "unpack_latent"]


def sparse_decode(
    q_THD: torch.Tensor,
    cache_PSD: torch.Tensor,
    rows_TK: torch.Tensor,
    scale: float,
    value_dim: int,
    sink_H: torch.Tensor | None = None,
    *,
    splits: int | None = None,
    check_rows: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MQA form over a latent cache.

    q_THD [T, H, D]; cache_PSD [P, S, D] of q's dtype, or [P, S, 656] uint8 (`pack_latent`; then D is 576, value_dim
    512 and q bf16 on a GPU, compute capability 8.9 or later); rows_TK [T, K] int32 or int64, -1 for "no row". splits:
    parts of a selection on a GPU; by default as many as fill it, which depends on T: fix it where results must not
    depend on the batch. check_rows: compare the rows with P x S and raise; by default on a CPU only (on a GPU: NaN for
    that token). Returns (out_THV in q's dtype, lse_TH natural logarithm, sink excluded); a token without rows gives 0
    and -inf. Raises ValueError on wrong shapes, dtypes, devices, strides or rows.
    """
    _check(q_THD, rows_TK, scale, sink_H, splits, cache_PSD=cache_PSD)
    packed = cache_PSD.dtype == torch.uint8
    dim = q_THD.shape[2]
    if packed and (dim, value_dim) != (576, 512):
        raise ValueError(f"q_THD: width {dim} and value_dim {value_dim} were given, a packed cache has 576 and 512")
    checks.check_shape("cache_PSD", cache_PSD, None, None, ROW_BYTES if packed else dim)
    if not packed:
        checks.check_same("dtype", q_THD=q_THD, cache_PSD=cache_PSD)
    if not 0 < value_dim <= dim:
        raise ValueError(f"value_dim: {value_dim} was given, 1..{dim} is accepted (values are the row's first columns)")
    cache_RX = cache_PSD.flatten(0, 1)
    if check_rows or (check_rows is None and not q_THD.is_cuda):
        checks.check_indices("rows_TK", rows_TK, cache_RX.shape[0])
    if not q_THD.is_cuda or rows_TK.numel() == 0:
        return reference.sparse_decode(q_THD, cache_PSD, rows_TK, scale, value_dim, sink_H)
    sink_H = None if sink_H is None else sink_H.float()
    if not packed:
        return sparse_decode_forward(
            q_THD, cache_RX.unsqueeze(1), None, rows_TK.int(), scale, value_dim, sink_H, splits
        )
    if capability(q_THD.device) < (8, 9):
        raise ValueError(
            f"cache_PSD: uint8 was given on compute capability {capability(q_THD.device)}, fp8 needs (8, 9)"
        )
    checks.check_dtype("q_THD", q_THD, (torch.bfloat16,))
    return sparse_decode_fp8_forward(q_THD, cache_RX, rows_TK.int(), scale, sink_H, splits)


def sparse_decode_gqa(
    q_THD: torch.Tensor,
    k_cache_PSGD: torch.Tensor,
    v_cache_PSGV: torch.Tensor,
    rows_TK: torch.Tensor,
    scale: float,
    sink_H: torch.Tensor | None = None,
    *,
    splits: int | None = None,
    check_rows: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GQA form: caches [P, S, G, D] and [P, S, G, V] of q's dtype, query head h reads head h // (H / G); the rest as in
    `sparse_decode`."""
    _check(q_THD, rows_TK, scale, sink_H, splits, k_cache_PSGD=k_cache_PSGD, v_cache_PSGV=v_cache_PSGV)
    heads, dim = q_THD.shape[1:]
    checks.check_shape("k_cache_PSGD", k_cache_PSGD, None, None, None, dim)
    checks.check_shape("v_cache_PSGV", v_cache_PSGV, *k_cache_PSGD.shape[:3], None)
    checks.check_same("dtype", q_THD=q_THD, k_cache_PSGD=k_cache_PSGD, v_cache_PSGV=v_cache_PSGV)
    if k_cache_PSGD.shape[2] == 0 or heads % k_cache_PSGD.shape[2]:
        raise ValueError(f"q_THD: {heads} heads were given, a multiple of {k_cache_PSGD.shape[2]} is accepted")
    k_RGD, v_RGV = k_cache_PSGD.flatten(0, 1), v_cache_PSGV.flatten(0, 1)
    if check_rows or (check_rows is None and not q_THD.is_cuda):
        checks.check_indices("rows_TK", rows_TK, k_RGD.shape[0])
    if not q_THD.is_cuda or rows_TK.numel() == 0:
        return reference.sparse_decode_gqa(q_THD, k_cache_PSGD, v_cache_PSGV, rows_TK, scale, sink_H)
    sink_H = None if sink_H is None else sink_H.float()
    return sparse_decode_forward(q_THD, k_RGD, v_RGV, rows_TK.int(), scale, v_RGV.shape[2], sink_H, splits)


def _check(q_THD, rows_TK, scale, sink_H, splits, **caches: torch.Tensor) -> None:
    checks.check_shape("q_THD", q_THD, None, None, None)
    checks.check_dtype("q_THD", q_THD, checks.FLOATS)
    checks.check_shape("rows_TK", rows_TK, q_THD.shape[0], None)
    checks.check_dtype("rows_TK", rows_TK, checks.INDICES)
    checks.check_same("device", q_THD=q_THD, rows_TK=rows_TK, **caches)
    checks.check_positive("scale", scale)
    if splits is not None and not 1 <= splits <= 64:
        raise ValueError(f"splits: {splits} was given, None or 1..64 is accepted")
    if sink_H is not None:
        checks.check_shape("sink_H", sink_H, q_THD.shape[1])
        checks.check_dtype("sink_H", sink_H, checks.FLOATS)
        checks.check_same("device", q_THD=q_THD, sink_H=sink_H)
    if not q_THD.is_cuda:
        return
    if q_THD.dtype == torch.float64:
        raise ValueError("q_THD: torch.float64 was given on a GPU, accepted there: float16, bfloat16, float32")
    if rows_TK.shape[1] > MAX_KEYS:
        raise ValueError(f"rows_TK: {rows_TK.shape[1]} rows per token were given, up to {MAX_KEYS} are accepted")
    for name, tensor in {"q_THD": q_THD, "rows_TK": rows_TK}.items():
        checks.check_inner_contiguous(name, tensor)
    for name, tensor in caches.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: strides {tensor.stride()} were given, a contiguous cache is accepted")
