"""Sparse attention: each query attends to the keys that were selected for it (Eq. 2 of arXiv 2512.02556).

On a CPU the PyTorch reference runs; on an NVIDIA GPU a Triton kernel, on Hopper with MLA's widths a Gluon kernel. The
backward pass is the reference's on every device: correct and chunked, not yet fast on a GPU.

Legend: T query tokens, S key rows, K selected keys, B = T / block selections, H query heads, G key-value heads, D key
width, V value width.
"""

import torch

from kernels import checks
from kernels.sparse_attention import reference
from kernels.sparse_attention.operator import sparse_attention_forward

MAX_KEYS = 8192
MAX_WIDTH = 1024


def sparse_attention(
    q_THD: torch.Tensor,
    kv_SD: torch.Tensor,
    indices_TK: torch.Tensor,
    scale: float,
    value_dim: int,
    sink_H: torch.Tensor | None = None,
    *,
    check_indices: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MQA form (MLA's latent attention): a key is a row of kv, its value the first `value_dim` columns of that row.

    q_THD [T, H, D] and kv_SD [S, D] of one floating dtype (no float64 on a GPU); indices_TK [T, K] int32 or int64,
    global rows of kv, -1 for "no key", no row twice; scale multiplies q·k; sink_H [H]: a logit without a value that
    takes part in the softmax's denominator. check_indices: compare the indices with S and raise; the default does so
    on a CPU only, since a GPU would have to wait: there a row with an index out of range comes out as NaN, and nothing
    is read for it. Returns (out_THV in q's dtype, lse_TH natural logarithm over the selected keys, sink excluded;
    fp32, float64 for float64). A row without keys gives out 0 and lse -inf. Raises ValueError on wrong shapes, dtypes,
    devices, strides or indices.
    """
    _check(q_THD, indices_TK, 1, scale, sink_H, None, kv_SD=kv_SD)
    dim = q_THD.shape[2]
    checks.check_shape("kv_SD", kv_SD, None, dim)
    if not 0 < value_dim <= dim:
        raise ValueError(f"value_dim: {value_dim} was given, 1..{dim} is accepted (values are kv_SD's first columns)")
    if check_indices or (check_indices is None and not q_THD.is_cuda):
        checks.check_indices("indices_TK", indices_TK, kv_SD.shape[0])
    if not q_THD.is_cuda or indices_TK.numel() == 0:
        return reference.sparse_attention(q_THD, kv_SD, indices_TK, scale, value_dim, sink_H)
    sink_H = None if sink_H is None else sink_H.float()
    return sparse_attention_forward(
        q_THD, kv_SD.unsqueeze(1), None, indices_TK.int(), scale, value_dim, sink_H, 1, None
    )


def sparse_attention_gqa(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor,
    indices_TK: torch.Tensor,
    scale: float,
    sink_H: torch.Tensor | None = None,
    *,
    block: int = 1,
    key_end_T: torch.Tensor | None = None,
    check_indices: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GQA form: query head h reads key-value head h // (H / G); one selection per token, shared by all heads.

    q_THD [T, H, D], k_SGD [S, G, D], v_SGV [S, G, V] of one floating dtype, H a multiple of G; the rest as in
    `sparse_attention`. block: so many neighbouring tokens share a selection, and indices_TK has ceil(T / block) rows:
    one gather then serves them all. key_end_T [T] int32: a token sees only the selected rows below it (causality
    inside a block).
    """
    _check(q_THD, indices_TK, block, scale, sink_H, key_end_T, k_SGD=k_SGD, v_SGV=v_SGV)
    heads, dim = q_THD.shape[1:]
    checks.check_shape("k_SGD", k_SGD, None, None, dim)
    checks.check_shape("v_SGV", v_SGV, *k_SGD.shape[:2], None)
    if k_SGD.shape[1] == 0 or heads % k_SGD.shape[1]:
        raise ValueError(f"q_THD: {heads} heads were given, a multiple of k_SGD's {k_SGD.shape[1]} heads is accepted")
    if check_indices or (check_indices is None and not q_THD.is_cuda):
        checks.check_indices("indices_TK", indices_TK, k_SGD.shape[0])
    if not q_THD.is_cuda or indices_TK.numel() == 0:
        indices_TK = reference.per_token(indices_TK, block, q_THD.shape[0], key_end_T)
        return reference.sparse_attention_gqa(q_THD, k_SGD, v_SGV, indices_TK, scale, sink_H)
    return sparse_attention_forward(
        q_THD,
        k_SGD,
        v_SGV,
        indices_TK.int(),
        scale,
        v_SGV.shape[2],
        None if sink_H is None else sink_H.float(),
        block,
        None if key_end_T is None else key_end_T.int(),
    )


def _check(q_THD, indices_TK, block: int, scale, sink_H, key_end_T, **keys: torch.Tensor) -> None:
    checks.check_shape("q_THD", q_THD, None, None, None)
    checks.check_dtype("q_THD", q_THD, checks.FLOATS)
    if block < 1:
        raise ValueError(f"block: {block} was given, 1 or more is accepted")
    checks.check_shape("indices_TK", indices_TK, -(-q_THD.shape[0] // block), None)
    checks.check_dtype("indices_TK", indices_TK, checks.INDICES)
    checks.check_same("dtype", q_THD=q_THD, **keys)
    checks.check_same("device", q_THD=q_THD, indices_TK=indices_TK, **keys)
    checks.check_positive("scale", scale)
    if sink_H is not None:
        checks.check_shape("sink_H", sink_H, q_THD.shape[1])
        checks.check_dtype("sink_H", sink_H, checks.FLOATS)
        checks.check_same("device", q_THD=q_THD, sink_H=sink_H)
    if key_end_T is not None:
        checks.check_shape("key_end_T", key_end_T, q_THD.shape[0])
        checks.check_dtype("key_end_T", key_end_T, checks.INDICES)
        checks.check_same("device", q_THD=q_THD, key_end_T=key_end_T)
    if not q_THD.is_cuda:
        return
    if q_THD.dtype == torch.float64:
        raise ValueError("q_THD: torch.float64 was given on a GPU, accepted there: float16, bfloat16, float32")
    if indices_TK.shape[1] > MAX_KEYS:
        raise ValueError(f"indices_TK: {indices_TK.shape[1]} keys per row were given, up to {MAX_KEYS} are accepted")
    for name, tensor in {"q_THD": q_THD, "indices_TK": indices_TK, **keys}.items():
        checks.check_inner_contiguous(name, tensor)
    for name, tensor in keys.items():
        if tensor.shape[-1] > MAX_WIDTH:
            raise ValueError(f"{name}: width {tensor.shape[-1]} was given, up to {MAX_WIDTH} is accepted on a GPU")
