"""Exact, deterministic top-k of each row: ties to the lowest position, ascending output."""

from torch import Tensor

from kernels.topk import reference


def topk(scores_TS: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The positions of the k largest scores of each row.

    Args:
        scores_TS: scores [T, S], a float dtype. NaN and -inf are never selected; -0.0 ties with 0.0.
        k: slots of a row, 1 to 4096; may exceed S.

    Returns:
        indices_TK [T, K] int32, ascending within the row, -1 after the last; lengths_T [T] int32.
        Among equal scores the lowest position wins, so the result is one definite set.
    """
    return reference.topk(scores_TS, k)
