"""Lightning indexer and top-k in one operation: on a GPU at most 1 GiB of scores or candidates exists at a time."""

from torch import Tensor

from kernels.indexer_scores.arguments import check_key_ranges, check_queries, check_slots
from kernels.indexer_topk import reference


def indexer_topk(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    k: int,
    q_scale_TH: Tensor | None = None,
    k_scale_S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k key rows with the largest indexer score of each query (arXiv 2512.02556, Eq. 1 and 2). No gradient.

    Args: as `kernels.indexer_scores.indexer_scores`, and k, the slots of a row (1 to 4096).

    Returns:
        indices_TK [T, K] int32: global key rows, ascending, -1 after the last; lengths_T [T] int32.
        Ties go to the lowest row; NaN and -inf scores are never selected.

    Raises:
        ValueError: as `kernels.indexer_scores.indexer_scores`, and for k out of range.
    """
    check_queries(q_THD, k_SD, weight_TH, q_scale_TH, k_scale_S)
    check_key_ranges(q_THD, k_SD, key_start_T, key_end_T)
    check_slots(k)
    if q_THD.is_cuda:
        from kernels.indexer_topk import triton

        return triton.indexer_topk(
            q_THD.detach(), k_SD.detach(), weight_TH.detach(), key_start_T, key_end_T, k, q_scale_TH, k_scale_S
        )
    return reference.indexer_topk(q_THD, k_SD, weight_TH, key_start_T, key_end_T, k, q_scale_TH, k_scale_S)
