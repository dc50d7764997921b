"""Dense attention of packed sequences: each query sees the key rows [key_start, key_end). PyTorch only, on every
device; whole causal sequences on a CPU go through its fused kernel.

Legend: T query tokens, S key rows, H query heads, G key-value heads, D key width, V value width.
"""

import torch

from kernels import checks
from kernels.dense_attention import cpu, reference


def dense_attention(
    q_THD: torch.Tensor,
    kv_SD: torch.Tensor,
    key_start_T: torch.Tensor,
    key_end_T: torch.Tensor,
    scale: float,
    value_dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MQA form: a key is a row of kv, its value the first `value_dim` columns of that row.

    q_THD [T, H, D] and kv_SD [S, D] of one floating dtype; key_start_T, key_end_T [T] int32 or int64, 0 <= start, end
    <= S (an end at or before the start: no keys); scale multiplies q·k. Neighbouring rows with one key_start are
    computed together. Returns (out_THV in q's dtype, lse_TH natural logarithm in fp32, float64 for float64, without
    gradient); no keys: out 0, lse -inf. Raises ValueError on wrong shapes, dtypes, devices or ranges.
    """
    checks.check_shape("q_THD", q_THD, None, None, None)
    checks.check_shape("kv_SD", kv_SD, None, q_THD.shape[2])
    if not 0 < value_dim <= q_THD.shape[2]:
        raise ValueError(
            f"value_dim: {value_dim} was given, 1..{q_THD.shape[2]} is accepted (the first columns of kv_SD)"
        )
    return dense_attention_gqa(
        q_THD, kv_SD.unsqueeze(1), kv_SD[:, :value_dim].unsqueeze(1), key_start_T, key_end_T, scale
    )


def dense_attention_gqa(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor,
    key_start_T: torch.Tensor,
    key_end_T: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GQA form: k_SGD [S, G, D], v_SGV [S, G, V]; query head h reads key-value head h // (H / G). The rest as in
    `dense_attention`."""
    checks.check_shape("q_THD", q_THD, None, None, None)
    tokens, heads, dim = q_THD.shape
    checks.check_shape("k_SGD", k_SGD, None, None, dim)
    checks.check_shape("v_SGV", v_SGV, *k_SGD.shape[:2], None)
    if k_SGD.shape[1] == 0 or heads % k_SGD.shape[1]:
        raise ValueError(f"q_THD: {heads} heads were given, a multiple of k_SGD's {k_SGD.shape[1]} heads is accepted")
    checks.check_dtype("q_THD", q_THD, checks.FLOATS)
    checks.check_same("dtype", q_THD=q_THD, k_SGD=k_SGD, v_SGV=v_SGV)
    checks.check_positive("scale", scale)
    checks.check_ranges(key_start_T, key_end_T, tokens, k_SGD.shape[0])
    checks.check_same("device", q_THD=q_THD, k_SGD=k_SGD, v_SGV=v_SGV, key_start_T=key_start_T, key_end_T=key_end_T)
    fused = tokens and q_THD.device.type == "cpu" and q_THD.dtype in (torch.float32, torch.float64)
    lengths = cpu.causal_lengths(key_start_T, key_end_T, k_SGD.shape[0]) if fused else None
    if lengths is not None:
        return cpu.dense_attention_gqa(q_THD, k_SGD, v_SGV, lengths, scale)
    out_THV, lse_TH = reference.dense_attention_gqa(q_THD, k_SGD, v_SGV, key_start_T, key_end_T, scale)
    return out_THV, lse_TH.detach()
