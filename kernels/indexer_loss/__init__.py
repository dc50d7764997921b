"""The lightning indexer's training loss (Eq. 3 and 4 of arXiv 2512.02556): KL(p || softmax(I)).

Legend: T query tokens, S key rows, K selected keys; H heads and D width, the indexer's own where the name begins with
index_ or is weight_TH, else the attention's.
"""

import torch

from kernels import checks
from kernels.indexer_loss import reference


def indexer_loss_sparse(
    index_q_THD: torch.Tensor,
    index_k_SD: torch.Tensor,
    weight_TH: torch.Tensor,
    indices_TK: torch.Tensor,
    target_TK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 4: both distributions over the selected keys only.

    index_q_THD [T, H, D], index_k_SD [S, D], weight_TH [T, H] (any floating dtypes, q and k the same); indices_TK [T,
    K] int32 or int64, -1 for "no key"; target_TK [T, K] from `kernels.attention_target` (L1-normalised here, so a sum
    over heads does too). Returns (loss_sum scalar in nats, fp32 or float64 for float64; number of rows with a key,
    int64 scalar): divide one by the other for the mean. Differentiable in index_q, index_k and weight only. Raises
    ValueError on wrong arguments.
    """
    _check_indexer(index_q_THD, index_k_SD, weight_TH)
    checks.check_shape("indices_TK", indices_TK, index_q_THD.shape[0], None)
    checks.check_dtype("indices_TK", indices_TK, checks.INDICES)
    checks.check_shape("target_TK", target_TK, *indices_TK.shape)
    checks.check_same("device", index_q_THD=index_q_THD, indices_TK=indices_TK, target_TK=target_TK)
    checks.check_indices("indices_TK", indices_TK, index_k_SD.shape[0])
    return reference.indexer_loss_sparse(index_q_THD, index_k_SD, weight_TH, indices_TK, target_TK)


def indexer_loss_dense(
    index_q_THD: torch.Tensor,
    index_k_SD: torch.Tensor,
    weight_TH: torch.Tensor,
    q_THD: torch.Tensor,
    kv_SD: torch.Tensor,
    key_start_T: torch.Tensor,
    key_end_T: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 3 (warm-up): both distributions over all keys of [key_start, key_end); never an L x L tensor at once.

    The indexer's arguments as in `indexer_loss_sparse`; q_THD [T, H, D] and kv_SD [S, D] (or [S, G, D] keys of a GQA
    model) give the attention whose head average is the target; scale multiplies q·k there. Ranges as in
    `kernels.dense_attention`. Returns (loss_sum in nats, number of rows with a key). Differentiable in index_q,
    index_k and weight only.
    """
    _check_indexer(index_q_THD, index_k_SD, weight_TH)
    checks.check_shape("q_THD", q_THD, index_q_THD.shape[0], None, None)
    keys_SGD = kv_SD.unsqueeze(1) if kv_SD.dim() == 2 else kv_SD
    checks.check_shape("kv_SD", keys_SGD, index_k_SD.shape[0], None, q_THD.shape[2])
    if keys_SGD.shape[1] == 0 or q_THD.shape[1] % keys_SGD.shape[1]:
        raise ValueError(f"q_THD: {q_THD.shape[1]} heads were given, a multiple of {keys_SGD.shape[1]} is accepted")
    checks.check_same("dtype", q_THD=q_THD, kv_SD=kv_SD)
    checks.check_positive("scale", scale)
    checks.check_ranges(key_start_T, key_end_T, q_THD.shape[0], keys_SGD.shape[0])
    checks.check_same(
        "device", index_q_THD=index_q_THD, q_THD=q_THD, kv_SD=kv_SD, key_start_T=key_start_T, key_end_T=key_end_T
    )
    return reference.indexer_loss_dense(
        index_q_THD, index_k_SD, weight_TH, q_THD.detach(), keys_SGD.detach(), key_start_T, key_end_T, scale
    )


def _check_indexer(index_q_THD, index_k_SD, weight_TH) -> None:
    checks.check_shape("index_q_THD", index_q_THD, None, None, None)
    checks.check_shape("index_k_SD", index_k_SD, None, index_q_THD.shape[2])
    checks.check_shape("weight_TH", weight_TH, *index_q_THD.shape[:2])
    checks.check_dtype("index_q_THD", index_q_THD, checks.FLOATS)
    checks.check_dtype("weight_TH", weight_TH, checks.FLOATS)
    checks.check_same("dtype", index_q_THD=index_q_THD, index_k_SD=index_k_SD)
    checks.check_same("device", index_q_THD=index_q_THD, index_k_SD=index_k_SD, weight_TH=weight_TH)
