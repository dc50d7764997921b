"""Sparse attention over selected keys, in plain PyTorch: the oracle of the kernels, and what runs on a CPU.

Legend: T query tokens, S key rows, K selected keys per token, H query heads, G key-value heads, D key width, V value
width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# Elements that one chunk of queries may gather (x 4 bytes = 64 MiB in fp32): large enough that nano models run in one
# chunk.
CHUNK_ELEMENTS = 1 << 24


def query_chunks(rows: int, elements_per_row: int) -> list[tuple[int, int]]:
    step = max(1, CHUNK_ELEMENTS // max(1, elements_per_row))
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


def _mqa_chunk(q_THD, kv_SD, indices_TK, scale: float, value_dim: int, sink_H):
    dtype = compute_dtype(q_THD.dtype)
    keys_TKD = gather_rows(kv_SD, indices_TK).to(dtype)
    scores_THK = torch.bmm(q_THD.to(dtype) * scale, keys_TKD.transpose(1, 2))
    p_THK, lse_TH = masked_softmax(scores_THK, (indices_TK >= 0).unsqueeze(1))
    out_THV = zero_empty(torch.bmm(p_THK, keys_TKD[..., :value_dim]), lse_TH)
    if sink_H is not None:
        out_THV = out_THV * sink_factor(lse_TH, sink_H).unsqueeze(-1)
    return out_THV.to(q_THD.dtype), lse_TH


def _gqa_chunk(q_THD, k_SGD, v_SGV, indices_TK, scale: float, sink_H):
    dtype = compute_dtype(q_THD.dtype)
    tokens, heads, dim = q_THD.shape
    groups, value_dim = v_SGV.shape[1:]
    keep = indices_TK.shape[1]
    k_TGKD = gather_rows(k_SGD.flatten(1), indices_TK).view(tokens, keep, groups, dim).transpose(1, 2).to(dtype)
    v_TGKV = gather_rows(v_SGV.flatten(1), indices_TK).view(tokens, keep, groups, value_dim).transpose(1, 2).to(dtype)
    q_TGhD = q_THD.view(tokens, groups, heads // groups, dim).to(dtype) * scale
    scores_TGhK = q_TGhD @ k_TGKD.transpose(2, 3)
    p_TGhK, lse_TGh = masked_softmax(scores_TGhK, (indices_TK >= 0)[:, None, None])
    lse_TH = lse_TGh.reshape(tokens, heads)
    out_THV = zero_empty((p_TGhK @ v_TGKV).reshape(tokens, heads, value_dim), lse_TH)
    if sink_H is not None:
        out_THV = out_THV * sink_factor(lse_TH, sink_H).unsqueeze(-1)
    return out_THV.to(q_THD.dtype), lse_TH


def sparse_attention(
    q_THD: torch.Tensor,
    kv_SD: torch.Tensor,
    indices_TK: torch.Tensor,
    scale: float,
    value_dim: int,
    sink_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """MQA form; differentiable in q, kv and sink. Saves O(T·D) for the backward pass once the queries need several
    chunks."""
    if indices_TK.shape[0] == 0 or indices_TK.shape[1] == 0:
        return empty_result(q_THD, value_dim)
    chunks = query_chunks(q_THD.shape[0], indices_TK.shape[1] * (kv_SD.shape[1] + q_THD.shape[1]))
    parts = [
        recomputed(_mqa_chunk, len(chunks), q_THD[a:b], kv_SD, indices_TK[a:b], scale, value_dim, sink_H)
        for a, b in chunks
    ]
    return joined(parts)


def sparse_attention_gqa(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor,
    indices_TK: torch.Tensor,
    scale: float,
    sink_H: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GQA form, one selection per token shared by all heads; differentiable in q, k, v and sink."""
    if indices_TK.shape[0] == 0 or indices_TK.shape[1] == 0:
        return empty_result(q_THD, v_SGV.shape[-1])
    per_row = indices_TK.shape[1] * (k_SGD[0].numel() + v_SGV[0].numel() + q_THD.shape[1])
    chunks = query_chunks(q_THD.shape[0], per_row)
    parts = [
        recomputed(_gqa_chunk, len(chunks), q_THD[a:b], k_SGD, v_SGV, indices_TK[a:b], scale, sink_H) for a, b in chunks
    ]
    return joined(parts)


def empty_result(q_THD: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    out_THV = q_THD.new_zeros(*q_THD.shape[:2], value_dim)
    return out_THV, q_THD.new_full(q_THD.shape[:2], float("-inf"), dtype=compute_dtype(q_THD.dtype))


def joined(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
