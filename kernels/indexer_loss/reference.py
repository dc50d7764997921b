"""KL divergence between the attention and the indexer's softmax, in plain PyTorch.

Legend: T query tokens, S key rows, K selected keys, I indexer heads, E indexer width, H attention heads, G key-value
heads, D attention key width; N sequences of a tile, Q queries and L keys of each.
"""

import torch

from kernels.dense_attention.reference import tile_scores
from kernels.packing import Tile, plan_tiles
from kernels.sparse_attention.reference import (
    compute_dtype,
    gather_rows,
    masked_softmax,
    query_chunks,
    recomputed,
)

# Score elements of one tile (x 4 bytes = 64 MiB in fp32): nano models run in one tile, without recomputation.
TILE_ELEMENTS = 1 << 24


def kl_sum(target: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Sum over rows of KL(target || softmax(scores over `valid`)); the gradient reaches `scores` only: softmax -
    target.

    Through log_softmax and never through target / (prediction + epsilon), which falsifies small gradients."""
    empty = ~valid.any(-1, keepdim=True)
    log_prediction = torch.log_softmax(scores.masked_fill(~valid & ~empty, float("-inf")), -1).masked_fill(~valid, 0.0)
    return (torch.special.xlogy(target, target) - target * log_prediction).sum()


def _normalised(target: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    target = target.detach().masked_fill(~valid, 0.0)
    return target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)


def _sparse_chunk(q_TIE, k_SE, weight_TI, indices_TK, target_TK):
    dtype = compute_dtype(q_TIE.dtype)
    valid_TK = indices_TK >= 0
    dots_TIK = torch.bmm(q_TIE.to(dtype), gather_rows(k_SE, indices_TK).to(dtype).transpose(1, 2))
    scores_TK = torch.bmm(weight_TI.to(dtype).unsqueeze(1), dots_TIK.relu()).squeeze(1)
    return kl_sum(_normalised(target_TK.to(dtype), valid_TK), scores_TK, valid_TK)


def indexer_loss_sparse(q_TIE, k_SE, weight_TI, indices_TK, target_TK) -> tuple[torch.Tensor, torch.Tensor]:
    valid_rows = (indices_TK >= 0).any(-1).sum()
    if indices_TK.numel() == 0:
        return (q_TIE.sum() * 0 + k_SE.sum() * 0 + weight_TI.sum() * 0).to(compute_dtype(q_TIE.dtype)), valid_rows
    chunks = query_chunks(q_TIE.shape[0], indices_TK.shape[1] * (q_TIE.shape[1] + q_TIE.shape[2]), q_TIE.device)
    sums = [
        recomputed(_sparse_chunk, len(chunks), q_TIE[a:b], k_SE, weight_TI[a:b], indices_TK[a:b], target_TK[a:b])
        for a, b in chunks
    ]
    return torch.stack(sums).sum(), valid_rows


def _dense_tile(index_q_TIE, index_k_SE, weight_TI, q_THD, k_SGD, tile: Tile, scale: float):
    dtype = compute_dtype(index_q_TIE.dtype)
    with torch.no_grad():
        p_NGQhL, _ = masked_softmax(tile_scores(q_THD, k_SGD, tile, scale), tile.valid_NQL[:, None, :, None])
        target_NQL = p_NGQhL.mean((1, 3)).to(dtype)
        del p_NGQhL
    dots_NQIL = tile_scores(index_q_TIE, index_k_SE.unsqueeze(1), tile, 1.0).squeeze(1)
    scores_NQL = (weight_TI[tile.rows_NQ].to(dtype).unsqueeze(2) @ dots_NQIL.relu()).squeeze(2)
    return kl_sum(target_NQL, scores_NQL, tile.valid_NQL)


def indexer_loss_dense(
    index_q_TIE, index_k_SE, weight_TI, q_THD, k_SGD, key_start_T, key_end_T, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    valid_rows = (key_end_T > key_start_T).sum()
    tiles = plan_tiles(key_start_T, key_end_T, q_THD.shape[1] + index_q_TIE.shape[1], TILE_ELEMENTS)
    if not tiles or k_SGD.shape[0] == 0:
        zero = index_q_TIE.sum() * 0 + index_k_SE.sum() * 0 + weight_TI.sum() * 0
        return zero.to(compute_dtype(index_q_TIE.dtype)), valid_rows
    sums = [
        recomputed(_dense_tile, len(tiles), index_q_TIE, index_k_SE, weight_TI, q_THD, k_SGD, tile, scale)
        for tile in tiles
    ]
    return torch.stack(sums).sum(), valid_rows
