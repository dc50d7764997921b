"""What the indexer learns from: the attention of all heads, averaged. Legend as in kernels.sparse_attention."""

import torch

from kernels.sparse_attention.reference import compute_dtype, gather_rows, masked_softmax, query_chunks


@torch.no_grad()
def attention_target(q_THD: torch.Tensor, k_SGD: torch.Tensor, indices_TK: torch.Tensor, scale: float) -> torch.Tensor:
    dtype = compute_dtype(q_THD.dtype)
    tokens, heads, dim = q_THD.shape
    keep, groups = indices_TK.shape[1], k_SGD.shape[1]
    target_TK = torch.zeros(tokens, keep, dtype=dtype, device=q_THD.device)
    if tokens == 0 or keep == 0:
        return target_TK
    for a, b in query_chunks(tokens, keep * (groups * dim + heads), q_THD.device):
        k_TGKD = gather_rows(k_SGD.flatten(1), indices_TK[a:b]).view(b - a, keep, groups, dim).transpose(1, 2).to(dtype)
        q_TGhD = q_THD[a:b].view(b - a, groups, heads // groups, dim).to(dtype) * scale
        p_TGhK, _ = masked_softmax(q_TGhD @ k_TGKD.transpose(2, 3), (indices_TK[a:b] >= 0)[:, None, None])
        target_TK[a:b] = p_TGhK.mean((1, 2))
    return target_TK
