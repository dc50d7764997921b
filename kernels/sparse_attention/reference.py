"""Sparse attention over selected keys, in plain PyTorch: the oracle of the kernels, and what runs on a CPU.

Legend: T query tokens, S key rows, K selected keys per token, H query heads, G key-value heads, D key width, V value
width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# Elements that one chunk of queries gathers: 4 MiB in fp32 on a CPU, half a GiB on a GPU, which wants wide launches.
CHUNK_ELEMENTS = 1 << 20
GPU_CHUNK_ELEMENTS = 1 << 27


def query_chunks(rows: int, elements_per_row: int, device: torch.device) -> list[tuple[int, int]]:
    budget = GPU_CHUNK_ELEMENTS if device.type == "cuda" else CHUNK_ELEMENTS
    step = max(1, budget // max(1, elements_per_row))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def recomputed(function: Callable[..., Any], chunks: int, *arguments: Any) -> Any:
    """Runs `function`; with several chunks its intermediates are recomputed in the backward pass, so that the saved
    memory stays proportional to the arguments."""
    if chunks > 1 and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_rows(rows_SX: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """[S, X] at [T, K] -> [T, K, X]. -1 reads a row that the same token selected, never one that nobody asked for: a
    cache may hold uninitialised rows, and 0 x NaN is NaN."""
    stand_in = indices_TK.amax(-1, keepdim=True).clamp(min=0)
    flat = torch.where(indices_TK < 0, stand_in, indices_TK).reshape(-1)
    return rows_SX.index_select(0, flat).view(*indices_TK.shape, rows_SX.shape[-1])


def masked_softmax(scores: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the last dimension where `valid` (broadcast) -> (probabilities, natural-log sum); a row without a
    valid key gives zeros and -inf, and no NaN in the backward pass."""
    empty = ~valid.any(-1, keepdim=True)
    # an additive bias costs nothing in the backward pass; an empty row keeps its scores and is zeroed afterwards: no
    # inf - inf
    bias = torch.zeros_like(valid, dtype=scores.dtype).masked_fill_(~valid & ~empty, float("-inf"))
    scores = scores + bias
    probabilities, lse = torch.softmax(scores, -1), torch.logsumexp(scores, -1)
    if bool(empty.any()):
        probabilities = probabilities.masked_fill(empty, 0.0)
        lse = lse.masked_fill(empty.squeeze(-1), float("-inf"))
    return probabilities, lse


def zero_empty(out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Rows without keys are 0 whatever the values hold: their stand-in row may be NaN."""
    return out.masked_fill(torch.isneginf(lse).unsqueeze(-1), 0.0)


def sink_factor(lse_TH: torch.Tensor, sink_H: torch.Tensor) -> torch.Tensor:
    """exp(lse) / (exp(lse) + exp(sink)): what is left of the output once the sink has taken its share."""
    return torch.sigmoid(lse_TH - sink_H.to(lse_TH.dtype))


def _gather_grouped(rows_SGX: torch.Tensor, indices_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """-> [T * G, K, X]"""
    (tokens, keep), (groups, width) = indices_TK.shape, rows_SGX.shape[1:]
    gathered = gather_rows(rows_SGX.flatten(1), indices_TK).view(tokens, keep, groups, width)
    return gathered.transpose(1, 2).reshape(tokens * groups, keep, width).to(dtype)


def _group_heads(x_THX: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """-> [T * G, h, X]: the query heads of one key-value head together."""
    tokens, heads, width = x_THX.shape
    return x_THX.reshape(tokens * groups, heads // groups, width).to(dtype)


def _probabilities(q_BhD: torch.Tensor, k_BKD: torch.Tensor, indices_TK: torch.Tensor):
    valid_B1K = (indices_TK >= 0).unsqueeze(1)
    groups = k_BKD.shape[0] // indices_TK.shape[0]
    if groups > 1:
        valid_B1K = valid_B1K.repeat_interleave(groups, 0)
    return masked_softmax(torch.bmm(q_BhD, k_BKD.transpose(1, 2)), valid_B1K)


class _SparseAttention(torch.autograd.Function):
    """Chunked over queries both ways; the backward pass gathers and recomputes, so that nothing of size T·K·D is saved.

    v_SGV None: the values are the first `value_dim` columns of the keys (one gather, one product for both gradients).
    Small chunks on purpose: they stay in the cache, and large ones spend as long in page faults as in arithmetic.
    """

    @staticmethod
    def forward(ctx, q_THD, k_SGD, v_SGV, sink_H, indices_TK, scale: float, value_dim: int):
        (tokens, heads, _), groups = q_THD.shape, k_SGD.shape[1]
        dtype = compute_dtype(q_THD.dtype)
        out_THV = q_THD.new_empty(tokens, heads, value_dim)
        lse_TH = q_THD.new_empty(tokens, heads, dtype=dtype)
        for a, b in _chunks(q_THD, k_SGD, value_dim, indices_TK):
            k_BKD = _gather_grouped(k_SGD, indices_TK[a:b], dtype)
            v_BKV = k_BKD[..., :value_dim] if v_SGV is None else _gather_grouped(v_SGV, indices_TK[a:b], dtype)
            p_BhK, lse_Bh = _probabilities(_group_heads(q_THD[a:b], groups, dtype) * scale, k_BKD, indices_TK[a:b])
            lse_TH[a:b] = lse_Bh.view(b - a, heads)
            chunk_THV = zero_empty(torch.bmm(p_BhK, v_BKV).view(b - a, heads, value_dim), lse_TH[a:b])
            if sink_H is not None:
                chunk_THV = chunk_THV * sink_factor(lse_TH[a:b], sink_H).unsqueeze(-1)
            out_THV[a:b] = chunk_THV
        ctx.save_for_backward(q_THD, k_SGD, v_SGV, sink_H, indices_TK)
        ctx.scale, ctx.value_dim = scale, value_dim
        return out_THV, lse_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out_THV, d_lse_TH):
        q_THD, k_SGD, v_SGV, sink_H, indices_TK = ctx.saved_tensors
        d_q, d_k, d_v, d_sink = gradients(
            q_THD, k_SGD, v_SGV, sink_H, indices_TK, ctx.scale, ctx.value_dim, d_out_THV, d_lse_TH
        )
        return d_q, d_k, d_v, d_sink, None, None, None


def gradients(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor | None,
    sink_H: torch.Tensor | None,
    indices_TK: torch.Tensor,
    scale: float,
    value_dim: int,
    d_out_THV: torch.Tensor,
    d_lse_TH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Of q, k (and of v through it where v is None), v and sink; recomputes what the forward pass did not save."""
    (heads, dim), groups = q_THD.shape[1:], k_SGD.shape[1]
    dtype = compute_dtype(q_THD.dtype)
    d_q = torch.empty_like(q_THD)
    d_k = torch.zeros(k_SGD.shape, dtype=dtype, device=q_THD.device)
    d_v = None if v_SGV is None else torch.zeros(v_SGV.shape, dtype=dtype, device=q_THD.device)
    d_sink = None if sink_H is None else torch.zeros(heads, dtype=dtype, device=q_THD.device)
    for a, b in _chunks(q_THD, k_SGD, value_dim, indices_TK):
        indices = indices_TK[a:b]
        k_BKD = _gather_grouped(k_SGD, indices, dtype)
        v_BKV = k_BKD[..., :value_dim] if v_SGV is None else _gather_grouped(v_SGV, indices, dtype)
        q_BhD = _group_heads(q_THD[a:b], groups, dtype) * scale
        p_BhK, lse_Bh = _probabilities(q_BhD, k_BKD, indices)
        empty = torch.isneginf(lse_Bh).unsqueeze(-1)
        d_out_BhV = _group_heads(d_out_THV[a:b], groups, dtype).masked_fill(empty, 0.0)
        shared_BhK = p_BhK
        if sink_H is not None:
            factor_TH = sink_factor(lse_Bh.view(b - a, heads), sink_H)
            shared_BhK = p_BhK * factor_TH.reshape(*lse_Bh.shape, 1)
        d_p_BhK = torch.bmm(d_out_BhV, v_BKV.transpose(1, 2)).masked_fill(empty, 0.0)
        delta_Bh1 = (shared_BhK * d_p_BhK).sum(-1, keepdim=True)
        d_s_BhK = shared_BhK * (d_p_BhK - delta_Bh1)
        d_s_BhK += p_BhK * d_lse_TH[a:b].reshape(*lse_Bh.shape, 1).to(dtype)
        if sink_H is not None:
            d_sink -= (delta_Bh1.view(b - a, heads) * (1 - factor_TH)).sum(0)
        d_q_BhD = torch.bmm(d_s_BhK, k_BKD).masked_fill(empty, 0.0) * scale
        d_q[a:b] = d_q_BhD.view(b - a, heads, dim)
        if d_v is None:
            padded_BhD = torch.nn.functional.pad(d_out_BhV, (0, dim - value_dim))
            both_BKh = torch.cat([d_s_BhK, shared_BhK], 1).transpose(1, 2)
            _scatter(d_k, torch.bmm(both_BKh, torch.cat([q_BhD, padded_BhD], 1)), indices)
        else:
            _scatter(d_k, torch.bmm(d_s_BhK.transpose(1, 2), q_BhD), indices)
            _scatter(d_v, torch.bmm(shared_BhK.transpose(1, 2), d_out_BhV), indices)
    d_v = None if d_v is None or v_SGV is None else d_v.to(v_SGV.dtype)
    return d_q, d_k.to(k_SGD.dtype), d_v, None if d_sink is None or sink_H is None else d_sink.to(sink_H.dtype)


def _chunks(q_THD, k_SGD, value_dim: int, indices_TK) -> list[tuple[int, int]]:
    groups, dim = k_SGD.shape[1:]
    per_row = indices_TK.shape[1] * (groups * (dim + value_dim) + q_THD.shape[1])
    return query_chunks(q_THD.shape[0], per_row, q_THD.device)


def _scatter(total_SGX: torch.Tensor, parts_BKX: torch.Tensor, indices_TK: torch.Tensor) -> None:
    """Adds [T * G, K, X] to the rows at [T, K]; what belongs to -1 is exactly zero (its probability is)."""
    (tokens, keep), (groups, width) = indices_TK.shape, total_SGX.shape[1:]
    parts = parts_BKX.view(tokens, groups, keep, width).transpose(1, 2).reshape(tokens * keep, groups, width)
    total_SGX.index_add_(0, indices_TK.clamp(min=0).reshape(-1), parts)


def sparse_attention(
    q_THD: torch.Tensor,
    kv_SD: torch.Tensor,
    indices_TK: torch.Tensor,
    scale: float,
    value_dim: int,
    sink_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MQA form; differentiable in q, kv and sink (once: there is no second derivative)."""
    if indices_TK.numel() == 0 or kv_SD.shape[0] == 0:
        return empty_result(q_THD, value_dim)
    return _SparseAttention.apply(q_THD, kv_SD.unsqueeze(1), None, sink_H, indices_TK, scale, value_dim)


def sparse_attention_gqa(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor,
    indices_TK: torch.Tensor,
    scale: float,
    sink_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GQA form, one selection per token shared by all heads; differentiable in q, k, v and sink (once)."""
    if indices_TK.numel() == 0 or k_SGD.shape[0] == 0:
        return empty_result(q_THD, v_SGV.shape[-1])
    return _SparseAttention.apply(q_THD, k_SGD, v_SGV, sink_H, indices_TK, scale, v_SGV.shape[-1])


def per_token(indices_BK: torch.Tensor, block: int, tokens: int, key_end_T: torch.Tensor | None) -> torch.Tensor:
    """One selection per block of tokens -> one per token, without the keys at or behind key_end."""
    indices_TK = indices_BK if block == 1 else indices_BK.repeat_interleave(block, 0)[:tokens]
    return indices_TK if key_end_T is None else indices_TK.masked_fill(indices_TK >= key_end_T.unsqueeze(1), -1)


def empty_result(q_THD: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    out_THV = q_THD.new_zeros(*q_THD.shape[:2], value_dim)
    return out_THV, q_THD.new_full(q_THD.shape[:2], float("-inf"), dtype=compute_dtype(q_THD.dtype))
