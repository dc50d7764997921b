"""Dense causal attention over packed sequences, in plain PyTorch: the dense base, the warm-up stage and evaluation.

Legend: T query tokens, S key rows, H query heads, G key-value heads, h = H / G, D key width, V value width;
N sequences of a tile, Q queries and L keys of each.
"""

import torch

from kernels.packing import Tile, plan_tiles, unpack
from kernels.sparse_attention.reference import compute_dtype, empty_result, masked_softmax, recomputed

# Score elements of one tile (x 4 bytes = 64 MiB in fp32): nano models run in one tile, without recomputation.
TILE_ELEMENTS = 1 << 24


def tile_scores(q_THD: torch.Tensor, k_SGD: torch.Tensor, tile: Tile, scale: float) -> torch.Tensor:
    """-> scores_NGQhL of one tile, not masked, in fp32 (float64 for float64)."""
    dtype = compute_dtype(q_THD.dtype)
    n, queries = tile.rows_NQ.shape
    length = tile.keys_NL.shape[1]
    (heads, dim), groups = q_THD.shape[1:], k_SGD.shape[1]
    q_NGQhD = q_THD[tile.rows_NQ].view(n, queries, groups, heads // groups, dim).transpose(1, 2).to(dtype) * scale
    k_NGLD = k_SGD[tile.keys_NL].transpose(1, 2).to(dtype)
    scores = torch.bmm(q_NGQhD.reshape(n * groups, -1, dim), k_NGLD.reshape(n * groups, length, dim).transpose(1, 2))
    return scores.view(n, groups, queries, heads // groups, length)


def _tile_attention(q_THD, k_SGD, v_SGV, tile: Tile, scale: float):
    n, queries = tile.rows_NQ.shape
    groups, value_dim = v_SGV.shape[1:]
    p_NGQhL, lse_NGQh = masked_softmax(tile_scores(q_THD, k_SGD, tile, scale), tile.valid_NQL[:, None, :, None])
    v_NGLV = v_SGV[tile.keys_NL].transpose(1, 2).to(p_NGQhL.dtype)
    out = torch.bmm(p_NGQhL.flatten(0, 1).flatten(1, 2), v_NGLV.flatten(0, 1)).view(n, groups, queries, -1, value_dim)
    return out.transpose(1, 2).flatten(2, 3).to(q_THD.dtype), lse_NGQh.transpose(1, 2).flatten(2)


def dense_attention_gqa(
    q_THD: torch.Tensor,
    k_SGD: torch.Tensor,
    v_SGV: torch.Tensor,
    key_start_T: torch.Tensor,
    key_end_T: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Differentiable in q, k and v; saves O(T·D) for the backward pass once the pairs need several tiles."""
    tiles = plan_tiles(key_start_T, key_end_T, q_THD.shape[1], TILE_ELEMENTS)
    if not tiles or k_SGD.shape[0] == 0:
        return empty_result(q_THD, v_SGV.shape[-1])
    parts = [recomputed(_tile_attention, len(tiles), q_THD, k_SGD, v_SGV, tile, scale) for tile in tiles]
    return unpack([part[0] for part in parts], tiles), unpack([part[1] for part in parts], tiles)
