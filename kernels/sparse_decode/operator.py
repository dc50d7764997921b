"""The GPU kernels as custom operators, so that torch.compile keeps them whole. Legend as in the package."""

import torch

from kernels.launch import capability, processors


def _fills_hopper(q_THD: torch.Tensor, value_dim: int) -> bool:
    """Whether the tokens alone fill a Hopper card: its prefill kernel is the faster one then."""
    tokens, heads, dim = q_THD.shape
    if heads % 64 or 3 * tokens * heads < 2 * 64 * processors(q_THD.device):
        return False
    from kernels.sparse_attention import gluon

    return gluon.supports(heads, dim, value_dim, q_THD.dtype, capability(q_THD.device))


def _fills_hopper_fp8(q_THD: torch.Tensor, cache_RB: torch.Tensor) -> bool:
    """Likewise for fp8 rows, where half a card of whole tokens is still faster than split ones."""
    tokens, heads, _ = q_THD.shape
    if cache_RB.shape[0] == 0 or 5 * tokens * heads < 2 * 64 * processors(q_THD.device):
        return False
    from kernels.sparse_decode import gluon

    return gluon.supports(heads, capability(q_THD.device))


@torch.library.custom_op("sparseline::sparse_decode", mutates_args=(), device_types="cuda")
def sparse_decode_forward(
    q_THD: torch.Tensor,
    k_RGD: torch.Tensor,
    v_RGV: torch.Tensor | None,
    rows_TK: torch.Tensor,
    scale: float,
    value_dim: int,
    sink_H: torch.Tensor | None,
    splits: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if v_RGV is None and splits is None and _fills_hopper(q_THD, value_dim):
        from kernels.sparse_attention import gluon

        return gluon.sparse_attention(q_THD, k_RGD[:, 0], rows_TK, scale, sink_H)
    from kernels.sparse_decode import triton

    return triton.sparse_decode(q_THD, k_RGD, v_RGV, rows_TK, scale, value_dim, sink_H, splits)


@sparse_decode_forward.register_fake
def _(q_THD, k_RGD, v_RGV, rows_TK, scale, value_dim, sink_H, splits):
    return q_THD.new_empty(*q_THD.shape[:2], value_dim), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)


@torch.library.custom_op("sparseline::sparse_decode_fp8", mutates_args=(), device_types="cuda")
def sparse_decode_fp8_forward(
    q_THD: torch.Tensor,
    cache_RB: torch.Tensor,
    rows_TK: torch.Tensor,
    scale: float,
    sink_H: torch.Tensor | None,
    splits: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernels.sparse_decode import triton

    if splits is None and _fills_hopper_fp8(q_THD, cache_RB):
        from kernels.sparse_decode import gluon

        return gluon.sparse_decode_fp8(q_THD, cache_RB, rows_TK, scale, sink_H)
    return triton.sparse_decode_fp8(q_THD, cache_RB, rows_TK, scale, sink_H, splits)


@sparse_decode_fp8_forward.register_fake
def _(q_THD, cache_RB, rows_TK, scale, sink_H, splits):
    return q_THD.new_empty(*q_THD.shape[:2], 512), q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32)
