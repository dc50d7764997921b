"""The GPU forward as a custom operator, so that torch.compile keeps it whole; its backward pass is the reference's.

Legend as in the package.
"""

import torch

from kernels.launch import capability
from kernels.sparse_attention import reference


@torch.library.custom_op("sparseline::sparse_attention", mutates_args=(), device_types="cuda")
def sparse_attention_forward(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor | None,
    indices_BK: torch.Tensor,
    scale: float,
    value_dim: int,
    sink_H: torch.Tensor | None,
    block: int,
    key_end_T: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    heads, dim = q_THD.shape[1:]
    target = capability(q_THD.device)
    if target == (9, 0) and v_SGV is None and block == 1 and key_end_T is None:
        from kernels.sparse_attention import gluon, gluon_few_heads

        for kernels in (gluon, gluon_few_heads):
            if kernels.supports(heads, dim, value_dim, q_THD.dtype, target):
                return kernels.sparse_attention(q_THD, k_SGD[:, 0], indices_BK, scale, sink_H)
    from kernels.sparse_attention import triton

    return triton.sparse_attention(q_THD, k_SGD, v_SGV, indices_BK, scale, value_dim, sink_H, block, key_end_T)


@sparse_attention_forward.register_fake
def _(q_THD, k_SGD, v_SGV, indices_BK, scale, value_dim, sink_H, block, key_end_T):
    return (
        q_THD.new_empty(*q_THD.shape[:2], value_dim),
        q_THD.new_empty(q_THD.shape[:2], dtype=torch.float32),
    )


@torch.library.custom_op("sparseline::sparse_attention_backward", mutates_args=(), device_types="cuda")
def sparse_attention_backward(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor | None,
    sink_H: torch.Tensor | None,
    indices_TK: torch.Tensor,
    scale: float,
    value_dim: int,
    d_out_THV: torch.Tensor,
    d_lse_TH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference reads values on the way, which tracing cannot: opaque to torch.compile. Absent: no elements."""
    grads = reference.gradients(
        q_THD, k_SGD, v_SGV, sink_H, indices_TK, scale, value_dim, d_out_THV.contiguous(), d_lse_TH.contiguous()
    )
    d_q, d_k, d_v, d_sink = (q_THD.new_empty(0) if grad is None else grad for grad in grads)
    return d_q, d_k, d_v, d_sink


@sparse_attention_backward.register_fake
def _(q_THD, k_SGD, v_SGV, sink_H, indices_TK, scale, value_dim, d_out_THV, d_lse_TH):
    absent = q_THD.new_empty(0)
    optional = (torch.empty_like(x) if x is not None else absent for x in (v_SGV, sink_H))
    return torch.empty_like(q_THD), torch.empty_like(k_SGD), *optional


def _save(ctx, inputs, output) -> None:
    q_THD, k_SGD, v_SGV, indices_BK, ctx.scale, ctx.value_dim, sink_H, block, key_end_T = inputs
    indices_TK = reference.per_token(indices_BK, block, q_THD.shape[0], key_end_T)
    ctx.save_for_backward(q_THD, k_SGD, v_SGV, sink_H, indices_TK)


def _backward(ctx, d_out_THV, d_lse_TH):
    q_THD, k_SGD, v_SGV, sink_H, indices_TK = ctx.saved_tensors
    d_q, d_k, d_v, d_sink = sparse_attention_backward(
        q_THD, k_SGD, v_SGV, sink_H, indices_TK, ctx.scale, ctx.value_dim, d_out_THV, d_lse_TH
    )
    d_v = None if v_SGV is None else d_v
    return d_q, d_k, d_v, None, None, None, None if sink_H is None else d_sink, None, None


sparse_attention_forward.register_autograd(_backward, setup_context=_save)
