"""Indexer scores reference against the sum of Eq. 1 written as loops over heads in float64."""

import pytest
import torch

from kernels.indexer_scores import indexer_scores, reference


def packed(lengths: list[int], heads: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """q, k, weight, key_start, key_end of causal packed sequences."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = sum(lengths)
    q_THD = torch.randn(tokens, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    k_SD = torch.randn(tokens, dim, generator=generator, dtype=torch.float64).to(dtype)
    weight_TH = torch.randn(tokens, heads, generator=generator, dtype=torch.float64) * (heads * dim) ** -0.5
    start = [
        first
        for first, length in zip(torch.tensor([0, *lengths]).cumsum(0), lengths, strict=False)
        for _ in range(length)
    ]
    return q_THD, k_SD, weight_TH.to(dtype), torch.tensor(start), torch.arange(tokens) + 1


def by_heads(q_THD, k_SD, weight_TH, key_start_T, key_end_T) -> torch.Tensor:
    total_TS = torch.zeros(q_THD.shape[0], k_SD.shape[0], dtype=torch.float64)
    for head in range(q_THD.shape[1]):
        total_TS += weight_TH[:, head, None].double() * torch.relu(q_THD[:, head].double() @ k_SD.double().T)
    for row in range(q_THD.shape[0]):
        total_TS[row, : key_start_T[row]] = -torch.inf
        total_TS[row, key_end_T[row] :] = -torch.inf
    return total_TS


@pytest.mark.parametrize("dtype,bar", [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_equals_the_sum_over_heads(dtype: torch.dtype, bar: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 3 * 5 * 58)  # chunks of 5 queries: the seams are in the test
    inputs = packed([1, 37, 20], heads=3, dim=16, dtype=dtype)
    scores_TS, expected_TS = indexer_scores(*inputs), by_heads(*inputs)
    assert torch.equal(scores_TS == -torch.inf, expected_TS == -torch.inf)
    visible = expected_TS > -torch.inf
    error = (scores_TS[visible].double() - expected_TS[visible]).norm() / expected_TS[visible].norm()
    assert error <= bar


def test_scales_multiply() -> None:
    q_THD, k_SD, weight_TH, start_T, end_T = packed([9, 14], heads=2, dim=8, dtype=torch.float64)
    q_scale_TH, k_scale_S = torch.rand(23, 2).double() + 0.5, torch.rand(23).double() + 0.5
    scaled = indexer_scores(q_THD, k_SD, weight_TH, start_T, end_T, q_scale_TH, k_scale_S)
    plain = indexer_scores(q_THD * q_scale_TH[:, :, None], k_SD * k_scale_S[:, None], weight_TH, start_T, end_T)
    torch.testing.assert_close(scaled, plain)
