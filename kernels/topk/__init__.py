"""Exact, deterministic top-k of each row: ties to the lowest position, ascending output."""

import torch
from torch import Tensor

from kernels import checks
from kernels.topk import reference

MAX_SLOTS = 4096


def topk(scores_TS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The positions of the k largest scores of each row.

    Args:
        scores_TS: scores [T, S], a float dtype. NaN and -inf are never selected; -0.0 ties with 0.0.
        k: slots of a row, 1 to 4096; may exceed S.

    Returns:
        indices_TK [T, K] int32, ascending within the row, -1 after the last; lengths_T [T] int32.
        Among equal scores the lowest position wins, so the result is one definite set.

    Raises:
        ValueError: on a wrong shape or dtype (no float64 on a GPU), or k out of range.
    """
    checks.check_shape("scores_TS", scores_TS, None, None)
    checks.check_dtype("scores_TS", scores_TS, checks.FLOATS)
    if not 1 <= k <= MAX_SLOTS:
        raise ValueError(f"k: {k} was given, 1..{MAX_SLOTS} is accepted")
    if scores_TS.is_cuda:
        if scores_TS.dtype == torch.float64:
            raise ValueError("scores_TS: dtype torch.float64 was given, a GPU accepts fp32, bf16 and fp16")
        from kernels.topk import triton

        return triton.topk(scores_TS.detach(), k)
    return reference.topk(scores_TS.detach(), k)
