"""Sparse attention: each query attends to the keys that were selected for it (Eq. 2 of arXiv 2512.02556).

Legend: T query tokens, S key rows, K selected keys per token, H query heads, G key-value heads, D key width, V value
width.
"""

import torch

from kernels import checks
from kernels.sparse_attention import reference


def sparse_attention(
    q_THD: torch.Tensor,
    kv_SD: torch.Tensor,
    indices_TK: torch.Tensor,
    scale: float,
    value_dim: int,
    sink_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MQA form (MLA's latent attention): a key is a row of kv, its value the first `value_dim` columns of that row.

    q_THD [T, H, D] and kv_SD [S, D] of one floating dtype; indices_TK [T, K] int32 or int64, global rows of kv, -1 for
    "no key", no row twice; scale multiplies q·k; sink_H [H]: a logit without a value that takes part in the softmax's
    denominator. Returns (out_THV in q's dtype, lse_TH natural logarithm over the selected keys, sink excluded; fp32,
    float64 for float64). A row without keys gives out 0 and lse -inf. Raises ValueError on wrong shapes, dtypes,
    devices or indices.
    """
    _check(q_THD, indices_TK, scale, sink_H, kv_SD=kv_SD)
    dim = q_THD.shape[2]
    checks.check_shape("kv_SD", kv_SD, None, dim)
    if not 0 < value_dim <= dim:
        raise ValueError(
            f"value_dim: {value_dim} was given, 1..{dim} is accepted (values are the first columns of kv_SD)"
        )
    checks.check_indices("indices_TK", indices_TK, kv_SD.shape[0])
    return reference.sparse_attention(q_THD, kv_SD, indices_TK, scale, value_dim, sink_H)


def sparse_attention_gqa(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor,
    indices_TK: torch.Tensor,
    scale: float,
    sink_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GQA form: query head h reads key-value head h // (H / G); one selection per token, shared by all heads.

    q_THD [T, H, D], k_SGD [S, G, D], v_SGV [S, G, V] of one floating dtype, H a multiple of G; the rest as in
    `sparse_attention`.
    """
    _check(q_THD, indices_TK, scale, sink_H, k_SGD=k_SGD, v_SGV=v_SGV)
    heads, dim = q_THD.shape[1:]
    checks.check_shape("k_SGD", k_SGD, None, None, dim)
    checks.check_shape("v_SGV", v_SGV, *k_SGD.shape[:2], None)
    if k_SGD.shape[1] == 0 or heads % k_SGD.shape[1]:
        raise ValueError(f"q_THD: {heads} heads were given, a multiple of k_SGD's {k_SGD.shape[1]} heads is accepted")
    checks.check_indices("indices_TK", indices_TK, k_SGD.shape[0])
    return reference.sparse_attention_gqa(q_THD, k_SGD, v_SGV, indices_TK, scale, sink_H)


def _check(q_THD, indices_TK, scale, sink_H, **keys: torch.Tensor) -> None:
    checks.check_shape("q_THD", q_THD, None, None, None)
    checks.check_dtype("q_THD", q_THD, checks.FLOATS)
    checks.check_shape("indices_TK", indices_TK, q_THD.shape[0], None)
    checks.check_dtype("indices_TK", indices_TK, checks.INDICES)
    checks.check_same("dtype", q_THD=q_THD, **keys)
    checks.check_same("device", q_THD=q_THD, indices_TK=indices_TK, **keys)
    checks.check_positive("scale", scale)
    if sink_H is not None:
        checks.check_shape("sink_H", sink_H, q_THD.shape[1])
        checks.check_dtype("sink_H", sink_H, checks.FLOATS)
        checks.check_same("device", q_THD=q_THD, sink_H=sink_H)
