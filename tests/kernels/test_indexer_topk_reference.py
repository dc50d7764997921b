"""Fused and paged selection references against the full score matrix and a sort."""

import pytest
import torch

from kernels.indexer_topk import indexer_topk
from kernels.indexer_topk import reference as fused_reference
from kernels.paged_indexer_topk import paged_indexer_topk
from kernels.paged_indexer_topk import reference as paged_reference
from tests.kernels.test_indexer_scores_reference import by_heads, packed
from tests.kernels.test_topk_reference import sorted_rule


def expected_rows(inputs, k: int) -> list[list[int]]:
    chosen = [sorted_rule(row, k) for row in by_heads(*inputs).tolist()]
    return [row + [-1] * (k - len(row)) for row in chosen]


@pytest.mark.parametrize("chunk", [1 << 23, 400])
@pytest.mark.parametrize("lengths", [[1], [40], [5, 1, 33, 2, 2, 17], [30, 31, 29]])
def test_packed_selection(lengths: list[int], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_reference, "CHUNK_ELEMENTS", chunk)
    inputs = packed(lengths, heads=3, dim=16, dtype=torch.float64)
    indices_TK, lengths_T = indexer_topk(*inputs, k=8)
    assert indices_TK.tolist() == expected_rows(inputs, 8)
    assert lengths_T.tolist() == [min(8, int(end - start)) for start, end in zip(*inputs[3:], strict=True)]


def test_empty_ranges_and_ranges_that_are_not_causal() -> None:
    q_THD, k_SD, weight_TH, _, _ = packed([12], heads=2, dim=8, dtype=torch.float64)
    start_T = torch.tensor([3] * 5 + [0] * 4 + [7] * 3)
    end_T = torch.tensor([12, 3, 2, 7, 12, 0, 0, 0, 0, 8, 7, 12])
    inputs = (q_THD, k_SD, weight_TH, start_T, end_T)
    indices_TK, lengths_T = indexer_topk(*inputs, k=4)
    assert indices_TK.tolist() == expected_rows(inputs, 4)
    assert lengths_T.tolist() == [4, 0, 0, 4, 4, 0, 0, 0, 0, 1, 0, 4]


def test_plateau_of_exact_zeros_goes_to_the_lowest_rows() -> None:
    q_THD, k_SD = torch.ones(6, 2, 4), -torch.ones(6, 4)
    k_SD[3] = 1.0
    indices_TK, _ = indexer_topk(q_THD, k_SD, torch.ones(6, 2), torch.zeros(6).long(), torch.arange(6) + 1, k=3)
    assert indices_TK.tolist() == [[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 1, 3], [0, 1, 3], [0, 1, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection_of_other_dtypes(dtype: torch.dtype) -> None:
    inputs = packed([50], heads=4, dim=16, dtype=dtype)
    assert indexer_topk(*inputs, k=8)[0].tolist() == expected_rows(inputs, 8)


def paged_case(ends: list[list[int]], page_size: int, heads: int, dim: int) -> dict[str, torch.Tensor]:
    """Sequences given by the `key_end` of each query token; pages shuffled, unused table entries are garbage."""
    generator = torch.Generator().manual_seed(7)
    used = [-(-max(end) // page_size) for end in ends]
    pages = torch.randperm(sum(used) + 3, generator=generator)
    table_NP = torch.full((len(ends), max(used) + 1), -77, dtype=torch.int32)
    for row, count in enumerate(used):
        table_NP[row, :count] = pages[sum(used[:row]) : sum(used[:row]) + count]
    tokens = sum(len(end) for end in ends)
    order = torch.randperm(tokens, generator=generator)  # tokens of a sequence need not be neighbours
    sequence_T = torch.tensor([row for row, end in enumerate(ends) for _ in end])[order]
    return {
        "q_THD": torch.randn(tokens, heads, dim, generator=generator, dtype=torch.float64),
        "k_cache_PSD": torch.randn(len(pages), page_size, dim, generator=generator, dtype=torch.float64),
        "weight_TH": torch.randn(tokens, heads, generator=generator, dtype=torch.float64),
        "page_table_NP": table_NP,
        "sequence_T": sequence_T,
        "key_end_T": torch.tensor([e for end in ends for e in end])[order],
    }


@pytest.mark.parametrize("chunk", [1 << 23, 300])
@pytest.mark.parametrize("ends", [[[1]], [[9], [30], [17], [16]], [[5, 6, 7], [29], [0], [12, 13]]])
def test_paged_selection(ends: list[list[int]], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_reference, "CHUNK_ELEMENTS", chunk)
    case = paged_case(ends, page_size=4, heads=3, dim=8)
    rows_TK, positions_TK, lengths_T = paged_indexer_topk(**case, k=6)
    for token in range(len(case["sequence_T"])):
        end = int(case["key_end_T"][token])
        pages = case["page_table_NP"][case["sequence_T"][token]].tolist()
        keys_SD = case["k_cache_PSD"][[pages[place // 4] for place in range(end)], [place % 4 for place in range(end)]]
        row = by_heads(
            case["q_THD"][token, None], keys_SD, case["weight_TH"][token, None], torch.tensor([0]), torch.tensor([end])
        )
        chosen = sorted_rule(row[0].tolist(), 6)
        assert lengths_T[token] == len(chosen)
        assert positions_TK[token].tolist() == chosen + [-1] * (6 - len(chosen))
        assert rows_TK[token].tolist() == [pages[p // 4] * 4 + p % 4 for p in chosen] + [-1] * (6 - len(chosen))
