"""Top-k reference against a Python sort of (-score, position) pairs."""

import math

import pytest
import torch

from kernels.topk.reference import topk


def sorted_rule(row: list[float], k: int) -> list[int]:
    candidates = [(-score, place) for place, score in enumerate(row) if not math.isnan(score) and score != -math.inf]
    return sorted(place for _, place in sorted(candidates)[:k])


def rows(kind: str, tokens: int, positions: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(positions)
    normal = torch.randn(tokens, positions, generator=generator)
    match kind:
        case "normal":
            return normal
        case "constant":
            return torch.full_like(normal, 1.5)
        case "two-valued":
            return torch.where(normal > 0.8, 2.0, -1.0)
        case "relu plateau":
            return torch.relu(normal - 1.5)
        case "zeros of both signs":
            return torch.where(normal > 0, 0.0, -0.0)
        case "sorted":
            return normal.sort(dim=1, descending=True).values
        case "denormal":
            return normal * 1e-41
        case "holes":
            bad = torch.tensor([math.nan, -math.inf, math.inf])[torch.randint(3, normal.shape, generator=generator)]
            return torch.where(torch.rand(normal.shape, generator=generator) < 0.6, bad, normal)
        case "nothing selectable":
            return torch.where(normal > 0, math.nan, -math.inf)
    raise ValueError(kind)


KINDS = [
    "normal",
    "constant",
    "two-valued",
    "relu plateau",
    "zeros of both signs",
    "sorted",
    "denormal",
    "holes",
    "nothing selectable",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions,k", [(1, 1), (1, 7), (37, 5), (64, 64), (100, 32), (33, 50)])
def test_equals_a_sort(kind: str, positions: int, k: int) -> None:
    scores_TS = rows(kind, 9, positions)
    indices_TK, lengths_T = topk(scores_TS, k)
    assert indices_TK.dtype == lengths_T.dtype == torch.int32
    for row, indices, length in zip(scores_TS.tolist(), indices_TK.tolist(), lengths_T.tolist(), strict=True):
        expected = sorted_rule(row, k)
        assert indices == expected + [-1] * (k - len(expected))
        assert length == len(expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    scores_TS = rows("normal", 5, 90).to(dtype)
    for row, indices in zip(scores_TS.double().tolist(), topk(scores_TS, 40)[0].tolist(), strict=True):
        assert indices == sorted_rule(row, 40)


def test_no_rows_and_no_positions() -> None:
    assert topk(torch.empty(0, 5), 3)[0].shape == (0, 3)
    indices_TK, lengths_T = topk(torch.empty(2, 0), 3)
    assert indices_TK.tolist() == [[-1] * 3] * 2
    assert lengths_T.tolist() == [0, 0]
