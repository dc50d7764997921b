"""Lightning indexer and top-k over a paged key cache: the selection step of decoding."""

import torch
from torch import Tensor

from kernels import checks
from kernels.indexer_scores.arguments import check_queries, check_slots
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

    Raises:
        ValueError: on wrong shapes, dtypes, devices or strides, k out of range, more than 2^31 cache rows, a head dim
            or an fp8 that the GPU has no kernel for, and on a CPU a sequence, a key end or a page in use out of range
            (on a GPU, which would have to wait for the values, the keys read are cut to the cache).
    """
    check_queries(q_THD, k_cache_PSD, weight_TH, q_scale_TH, k_scale_PS)
    check_slots(k)
    _check_pages(q_THD, k_cache_PSD, page_table_NP, sequence_T, key_end_T)
    if q_THD.is_cuda:
        from kernels.paged_indexer_topk import triton

        return triton.paged_indexer_topk(
            q_THD.detach(),
            k_cache_PSD.detach(),
            weight_TH.detach(),
            page_table_NP,
            sequence_T,
            key_end_T,
            k,
            q_scale_TH,
            k_scale_PS,
        )
    return reference.paged_indexer_topk(
        q_THD, k_cache_PSD, weight_TH, page_table_NP, sequence_T, key_end_T, k, q_scale_TH, k_scale_PS
    )


def _check_pages(
    q_THD: Tensor, k_cache_PSD: Tensor, page_table_NP: Tensor, sequence_T: Tensor, key_end_T: Tensor
) -> None:
    tokens = q_THD.shape[0]
    pages, page_size = k_cache_PSD.shape[:2]
    checks.check_shape("page_table_NP", page_table_NP, None, None)
    checks.check_inner_contiguous("page_table_NP", page_table_NP)
    for name, tensor in (("sequence_T", sequence_T), ("key_end_T", key_end_T)):
        checks.check_shape(name, tensor, tokens)
    indices = {"page_table_NP": page_table_NP, "sequence_T": sequence_T, "key_end_T": key_end_T}
    for name, tensor in indices.items():
        checks.check_dtype(name, tensor, checks.INDICES)
    checks.check_same("device", q_THD=q_THD, **indices)
    if pages * page_size > 2**31 - 1:
        raise ValueError(f"k_cache_PSD: {pages} pages of {page_size} were given, row numbers have to fit int32")
    if q_THD.is_cuda or tokens == 0:
        return
    sequences, table_pages = page_table_NP.shape
    if int(sequence_T.min()) < 0 or int(sequence_T.max()) >= sequences:
        given = f"{int(sequence_T.min())}..{int(sequence_T.max())}"
        raise ValueError(f"sequence_T: {given} was given, 0..{sequences - 1} is accepted (rows of page_table_NP)")
    if int(key_end_T.max()) > table_pages * page_size:
        raise ValueError(
            f"key_end_T: {int(key_end_T.max())} was given, the page table has room for {table_pages * page_size}"
        )
    used_N = torch.zeros(sequences, dtype=torch.int64).scatter_reduce(0, sequence_T.long(), key_end_T.long(), "amax")
    in_use_NP = torch.arange(table_pages) * page_size < used_N[:, None]
    bad = page_table_NP[in_use_NP & ((page_table_NP < 0) | (page_table_NP >= pages))]
    if bad.numel():
        raise ValueError(f"page_table_NP: page {int(bad[0])} is in use, 0..{pages - 1} is accepted")
