"""The target distribution of the indexer's loss over the selected keys (p of Eq. 4, arXiv 2512.02556)."""

import torch

from kernels import checks
from kernels.attention_target import reference


def attention_target(q_THD: torch.Tensor, kv_SD: torch.Tensor, indices_TK: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax over the selected keys, averaged over the heads (a softmax sums to 1, so this is the L1-normalised sum
    of Eq. 4).

    q_THD [T, H, D]; kv_SD [S, D], or [S, G, D] keys of a GQA model; indices_TK [T, K] int32 or int64, -1 for "no key".
    Returns target_TK fp32 (float64 for float64), detached; 0 where the index is -1, so a row sums to 1 or, without
    keys, to 0. Raises ValueError on wrong shapes, dtypes, devices or indices.
    """
    checks.check_shape("q_THD", q_THD, None, None, None)
    keys_SGD = kv_SD.unsqueeze(1) if kv_SD.dim() == 2 else kv_SD
    checks.check_shape("kv_SD", keys_SGD, None, None, q_THD.shape[2])
    if keys_SGD.shape[1] == 0 or q_THD.shape[1] % keys_SGD.shape[1]:
        raise ValueError(f"q_THD: {q_THD.shape[1]} heads were given, a multiple of {keys_SGD.shape[1]} is accepted")
    checks.check_shape("indices_TK", indices_TK, q_THD.shape[0], None)
    checks.check_dtype("indices_TK", indices_TK, checks.INDICES)
    checks.check_dtype("q_THD", q_THD, checks.FLOATS)
    checks.check_same("dtype", q_THD=q_THD, kv_SD=kv_SD)
    checks.check_same("device", q_THD=q_THD, kv_SD=kv_SD, indices_TK=indices_TK)
    checks.check_positive("scale", scale)
    checks.check_indices("indices_TK", indices_TK, kv_SD.shape[0])
    return reference.attention_target(q_THD.detach(), keys_SGD.detach(), indices_TK, scale)
