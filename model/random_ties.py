"""Top-k of the lightning indexer that gives ties to a random key: what a nondeterministic kernel does.

For the ablation that shows why ties are given to the lowest position; nothing else may use it. Plain PyTorch.
Shape suffixes: T tokens, H indexer heads, D head dim, L padded positions, K slots, N sequences, P pages, S page size.
"""

from __future__ import annotations

import torch

from kernels.indexer_scores.reference import compute_dtype
from kernels.indexer_topk.reference import batched_scores


@torch.no_grad()
def random_tie_positions(
    q_THD: torch.Tensor,
    k_cache_PSD: torch.Tensor,
    weight_TH: torch.Tensor,
    page_table_NP: torch.Tensor,
    sequence_T: torch.Tensor,
    key_end_T: torch.Tensor,
    k: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """Positions [T, K] of the k best keys of each token, ascending, -1 behind the last; arguments as in
    `kernels.paged_indexer_topk`."""
    dtype = compute_dtype(q_THD, k_cache_PSD, weight_TH)
    longest = int(key_end_T.max())
    pages = -(-longest // k_cache_PSD.shape[1])
    key_TLD = k_cache_PSD[page_table_NP[sequence_T, :pages].long()].flatten(1, 2)[:, :longest].to(dtype)
    score_TL = batched_scores(q_THD.to(dtype)[:, None], key_TLD.transpose(1, 2), weight_TH.to(dtype)[:, None]).squeeze(
        1
    )
    position_L = torch.arange(longest)
    hidden_TL = position_L >= key_end_T[:, None]
    score_TL = score_TL.masked_fill(hidden_TL, float("-inf"))
    # a stable sort of shuffled columns: equal scores come in random order
    shuffle_TL = torch.rand(score_TL.shape, generator=generator).argsort(dim=-1)
    order_TL = score_TL.gather(1, shuffle_TL).argsort(dim=-1, descending=True, stable=True)
    best_TK = shuffle_TL.gather(1, order_TL)[:, :k]
    best_TK = best_TK.masked_fill(hidden_TL.gather(1, best_TK), longest).sort(dim=-1).values
    return torch.where(best_TK < longest, best_TK, -1)
