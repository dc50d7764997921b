"""Lightning indexer and top-k over a paged key cache: the selection step of decoding."""

from torch import Tensor

from kernels.paged_indexer_topk import reference


def paged_indexer_topk(
    q_THD: Tensor,
    k_cache_PSD: Tensor,
    weight_TH: Tensor,
    page_table_NP: Tensor,
    sequence_T: Tensor,
    key_end_T: Tensor,
    k: int,
    q_scale_TH: Tensor | None = None,
    k_scale_PS: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k cached positions with the largest indexer score of each query token. No gradient.

    Args:
        q_THD: queries [T, H, D]; a sequence may have several.
        k_cache_PSD: key cache [pages, page size, D].
        weight_TH: head weights [T, H], any sign; they already hold n_heads^-0.5 * head_dim^-0.5.
        page_table_NP: int32 [N, pages of a sequence]: the cache page of each stretch of positions; entries past the
            last position in use are ignored (any value).
        sequence_T: int64 [T], the row of the page table of each token.
        key_end_T: integers [T], positions [0, key_end) are visible to the token.
        k: slots of a row (1 to 4096).
        q_scale_TH, k_scale_PS: fp32 factors of the stored queries and keys (fp8), each optional.

    Returns:
        rows_TK [T, K] int32: cache rows page * page_size + offset in ascending POSITION order, -1 after the last;
        positions_TK [T, K] int32: the positions, likewise; lengths_T [T] int32.
    """
    return reference.paged_indexer_topk(
        q_THD, k_cache_PSD, weight_TH, page_table_NP, sequence_T, key_end_T, k, q_scale_TH, k_scale_PS
    )
