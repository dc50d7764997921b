"""The top-k kernel against the reference: in Triton's interpreter without a GPU, at full size on the card."""

import pytest
import torch

from kernels.topk import MAX_SLOTS, reference, topk
from kernels.topk import triton as kernels
from tests.kernels.ahead_of_time import compile_all
from tests.kernels.test_topk_reference import KINDS, rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"CAPACITY": 64, "R": 2, "W": 4}  # a row of some hundreds passes many chunks and compactions


def assert_same(scores_TS: torch.Tensor, k: int, **options) -> None:
    got = kernels.select(scores_TS.to(DEVICE), k, **options)
    want = reference.topk(scores_TS, k)
    assert torch.equal(got[0].cpu(), want[0])
    assert torch.equal(got[1].cpu(), want[1])


@pytest.mark.skipif(DEVICE == "cuda", reason="a warp is wider than these chunks: the gpu test below covers the card")
@pytest.mark.parametrize("kind", KINDS)
def test_many_chunks_and_compactions(kind: str) -> None:
    assert_same(rows(kind, 2, 300), 16, sizes=SMALL, sample=32, splits=1)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
@pytest.mark.parametrize("positions, k, splits", [(1, 1, 1), (10, 16, 1), (131, 7, 3), (256, 16, 2)])
def test_odd_lengths_and_splits(positions: int, k: int, splits: int) -> None:
    assert_same(rows("normal", 2, positions), k, sizes=SMALL, sample=32, splits=splits)
    assert_same(rows("relu plateau", 2, positions), k, sizes=SMALL, sample=32, splits=splits)


@pytest.mark.skipif(DEVICE == "cuda", reason="as above")
@pytest.mark.parametrize("descending", [True, False])
def test_sorted_rows_and_a_guess_that_fails(descending: bool) -> None:
    # all large scores lie where the sample looks: the guessed threshold is too high and the row is read again
    scores_TS = torch.arange(512.0).flip(0)[None] if descending else torch.arange(512.0)[None]
    stride = 512 // (32 // 8) // 8 * 8
    scores_TS[:, torch.arange(512) % stride < 8] += 1000.0
    assert_same(scores_TS, 48, sizes=SMALL | {"CAPACITY": 256}, sample=32, splits=1)


def test_default_sizes() -> None:
    assert_same(rows("holes", 1, 9000), 300)


@pytest.mark.slow
def test_custom_op_is_opaque_to_compilation() -> None:
    scores_TS = rows("normal", 2, 40).to(DEVICE)
    torch.library.opcheck(kernels.topk, (scores_TS, 5), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "scores, k, name",
    [
        (torch.zeros(3), 2, "scores_TS"),
        (torch.zeros(3, 4, dtype=torch.int32), 2, "scores_TS"),
        (torch.zeros(3, 4), 0, "k:"),
        (torch.zeros(3, 4), MAX_SLOTS + 1, "k:"),
    ],
)
def test_bad_arguments(scores: torch.Tensor, k: int, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        topk(scores, k)


@pytest.mark.slow
def test_compiles_ahead_for_each_generation() -> None:
    arguments = dict.fromkeys(["score_ptr", "out_score_ptr"], "*fp32")
    arguments |= dict.fromkeys(["out_position_ptr", "length_ptr"], "*i32") | {"buffer_ptr": "*i64"}
    names = ["tasks", "splits", "positions", "split_positions", "row_stride", "k", "limit"]
    constants = {
        "position_ptr": None,
        "start_ptr": None,
        "end_ptr": None,
        "chosen_ptr": None,
        "CAPACITY": 4096,
        "R": 2,
        "W": 128,
        "SAMPLE": 4096,
        "SIGMAS": 3.5,
    }
    requests = [
        {
            "function": "kernels.topk.triton:topk_kernel",
            "arguments": arguments | dict.fromkeys(names, "i32"),
            "constants": constants,
            "options": {"num_warps": 4, "maxnreg": 80},
            "capability": capability,
        }
        for capability in (80, 89, 90)
    ]
    assert all(result["shared"] <= 101_376 for result in compile_all(requests))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions, k", [(1, 1), (5001, 7), (20000, 2048), (40000, 4096), (131072, 2048), (100, 300)])
def test_card(kind: str, positions: int, k: int) -> None:
    scores_TS = rows(kind, 5, positions)
    assert_same(scores_TS, k)
    assert_same(scores_TS, k, splits=1)


@pytest.mark.gpu
def test_card_repeats_bitwise() -> None:
    scores_TS = torch.relu(rows("normal", 300, 70000) - 1.0).cuda()
    first = topk(scores_TS, 2048)
    assert all(torch.equal(topk(scores_TS, 2048)[0], first[0]) for _ in range(20))
    assert torch.equal(first[0].cpu(), reference.topk(scores_TS.cpu(), 2048)[0])
