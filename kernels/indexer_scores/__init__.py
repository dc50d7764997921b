"""Lightning indexer scores: I[t, s] = sum_h w[t, h] * ReLU(q[t, h] . k[s])."""

from torch import Tensor

from kernels.indexer_scores import reference
from kernels.indexer_scores.arguments import check_key_ranges, check_queries


def indexer_scores(
    q_THD: Tensor,
    k_SD: Tensor,
    weight_TH: Tensor,
    key_start_T: Tensor,
    key_end_T: Tensor,
    q_scale_TH: Tensor | None = None,
    k_scale_S: Tensor | None = None,
) -> Tensor:
    """Scores of every query with the keys of its range (DeepSeek-V3.2, arXiv 2512.02556, Eq. 1).

    Args:
        q_THD: queries [T, H, D].
        k_SD: keys [S, D], one head shared by all query heads.
        weight_TH: head weights [T, H], any sign; they already hold n_heads^-0.5 * head_dim^-0.5.
        key_start_T, key_end_T: first key row and the row after the last one, per query (integers [T]).
        q_scale_TH, k_scale_S: fp32 factors of the stored queries and keys (fp8), each optional.

    Returns:
        scores_TS [T, S] fp32 (float64 for float64 input); -inf outside [key_start, key_end).
        On a GPU without gradient (training takes its loss from `kernels.indexer_loss`).

    Raises:
        ValueError: on wrong shapes, dtypes, devices or strides, a head dim or an fp8 that the GPU has no kernel for,
            and on a CPU key ranges outside 0..S (a GPU cuts them to it).
    """
    check_queries(q_THD, k_SD, weight_TH, q_scale_TH, k_scale_S)
    check_key_ranges(q_THD, k_SD, key_start_T, key_end_T)
    if q_THD.is_cuda:
        from kernels.indexer_scores import triton

        return triton.indexer_scores(
            q_THD.detach(), k_SD.detach(), weight_TH.detach(), key_start_T, key_end_T, q_scale_TH, k_scale_S
        )
    return reference.indexer_scores(q_THD, k_SD, weight_TH, key_start_T, key_end_T, q_scale_TH, k_scale_S)
