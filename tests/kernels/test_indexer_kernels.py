"""Indexer scores, fused and paged selection kernels: in Triton's interpreter without a GPU, at full size on a GPU."""

from functools import partial

import pytest
import torch

from kernels.indexer_scores import indexer_scores
from kernels.indexer_scores import reference as scores_reference
from kernels.indexer_scores import triton as scores_kernels
from kernels.indexer_topk import gluon as selection_kernels
from kernels.indexer_topk import indexer_topk
from kernels.indexer_topk import reference as fused_reference
from kernels.indexer_topk import triton as fused_kernels
from kernels.paged_indexer_topk import gluon as paged_selection_kernels
from kernels.paged_indexer_topk import paged_indexer_topk
from kernels.paged_indexer_topk import reference as paged_reference
from kernels.topk import reference as topk_reference
from tests.kernels.ahead_of_time import compile_all
from tests.kernels.test_indexer_topk_reference import paged_case

INTERPRETED = not torch.cuda.is_available()
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="sizes below a warp's; the gpu tests cover the card")
SIZES = {"CAPACITY": 64, "R": 2, "W": 4}
SHAPE = {"B": 4, "M": 16, "STAGES": 2, "num_warps": 4}
FP8 = torch.float8_e4m3fn


def last_queries(tokens: int, keys: int, heads: int, dim: int, dtype: torch.dtype, guard: int = 0) -> tuple:
    """The last queries of a causal sequence; with `guard`, NaN lies before and behind each operand."""
    generator = torch.Generator().manual_seed(tokens + keys + heads)

    def draw(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator)
        padded = torch.full((guard + shape[0] + guard, *shape[1:]), torch.nan)
        padded[guard : guard + shape[0]] = values
        return padded[guard : guard + shape[0]]

    def cast(values: torch.Tensor) -> torch.Tensor:
        base = values if not guard else values._base
        assert base is not None
        return base.to(dtype)[guard : guard + values.shape[0]]

    scales = (draw(tokens, heads).abs() + 0.5, draw(keys).abs() + 0.5) if dtype == FP8 else (None, None)
    q_THD, k_SD = cast(draw(tokens, heads, dim)), cast(draw(keys, dim))
    end_T = torch.arange(keys - tokens, keys) + 1
    return q_THD, k_SD, draw(tokens, heads) * (heads * dim) ** -0.5, torch.zeros_like(end_T), end_T, *scales


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    seen = want > -torch.inf
    assert torch.equal(got > -torch.inf, seen)
    return float((got[seen].double() - want[seen].double()).norm() / want[seen].double().norm())


def double(inputs: tuple) -> tuple:
    cpu = tuple(x.cpu() if x is not None else None for x in inputs)
    return tuple(x.double() if x is not None and x.is_floating_point() else x for x in cpu)


def overlap(got: torch.Tensor, want: torch.Tensor) -> float:
    """Share of equal members: sums differ in order, so that near-ties may swap."""
    pairs = [(set(g), set(w)) for g, w in zip(got.tolist(), want.tolist(), strict=True)]
    return sum(len(g & w) for g, w in pairs) / sum(len(w) for _, w in pairs)


@interpreter_only
@pytest.mark.parametrize("dtype, heads, dim", [(torch.float32, 3, 16), (torch.bfloat16, 8, 32), (FP8, 16, 32)])
@pytest.mark.parametrize("windows, described", [(1, True), (2, False)])
def test_scores(dtype: torch.dtype, heads: int, dim: int, windows: int, described: bool) -> None:
    inputs = last_queries(7, 75, heads, dim, dtype, guard=16)
    got = scores_kernels.launch(*inputs, shape=SHAPE, windows=windows, described=described)
    assert error(got, scores_reference.indexer_scores(*double(inputs))) <= 1e-5


@interpreter_only
@pytest.mark.parametrize("splits, described", [(1, True), (3, False)])
@pytest.mark.parametrize("plateau", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fused_selection(splits: int, described: bool, plateau: bool) -> None:
    inputs = list(last_queries(6, 300, 4, 16, torch.float32, guard=16))
    if plateau:
        inputs[2] = inputs[2].abs()  # no negative weight: a plateau of exact zeros
        inputs[1] = torch.where(torch.arange(300)[:, None] % 3 > 0, -inputs[0][0, 0].abs().sum() * 1e-9, inputs[1])
    inputs[3][4:] = 130  # another sequence for the last two rows of the block
    options = {"sizes": SIZES, "shape": SHAPE, "guess_from": 128}
    got = fused_kernels.launch(*inputs[:5], 8, *inputs[5:], splits=splits, described=described, **options)
    # the kernel's own scores decide near-ties; the scores are checked above
    want = topk_reference.topk(scores_kernels.launch(*inputs, shape=SHAPE, described=False), 8)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@interpreter_only
@pytest.mark.parametrize("rows", [4, 6])
def test_selection_by_rows(rows: int) -> None:
    inputs = list(last_queries(6, 300, 4, 16, torch.float32, guard=16))
    inputs[3][3:] = 130  # another sequence; a block of queries spans both
    inputs[3][5] = inputs[4][5] = 7  # no keys
    got = fused_kernels.by_rows(*inputs[:5], 8, *inputs[5:], scores=rows * 300, shape=SHAPE, sizes=SIZES)
    want = topk_reference.topk(scores_kernels.launch(*inputs, shape=SHAPE, described=False), 8)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


@interpreter_only
@pytest.mark.parametrize("splits", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_paged_selection(splits: int) -> None:
    case = paged_case([[5, 6], [69], [0], [12]], page_size=4, heads=3, dim=16)
    case = {name: t.float() if t.dtype == torch.float64 else t for name, t in case.items()}
    got = fused_kernels.launch(
        case["q_THD"], case["k_cache_PSD"], case["weight_TH"], None, case["key_end_T"], 6,
        page_table_NP=case["page_table_NP"], sequence_T=case["sequence_T"], splits=splits,
        sizes={"CAPACITY": 32, "R": 2, "W": 2}, shape=SHAPE | {"B": 1},
    )  # fmt: skip
    _, positions_TK, lengths_T = paged_reference.paged_indexer_topk(**case, k=6)
    assert torch.equal(got[0], positions_TK)
    assert torch.equal(got[1], lengths_T)


@pytest.mark.slow
@interpreter_only
def test_paged_op_maps_positions_to_rows() -> None:
    from kernels.paged_indexer_topk import triton as paged_kernels

    case = paged_case([[30]], page_size=4, heads=2, dim=16)
    case = {name: t.float() if t.dtype == torch.float64 else t for name, t in case.items()}
    for got, want in zip(
        paged_kernels.paged_indexer_topk(**case, k=6), paged_reference.paged_indexer_topk(**case, k=6), strict=True
    ):
        assert torch.equal(got, want)


def test_bad_arguments() -> None:
    q, k, weight, start, end, _, _ = last_queries(3, 9, 2, 16, torch.float32)
    for arguments, name in [
        ((q[0], k, weight, start, end), "q_THD"),
        ((q, k[:, :8].contiguous(), weight, start, end), "k_SD"),
        ((q, k.bfloat16(), weight, start, end), "dtype"),
        ((q, k, weight[:, :1], start, end), "weight_TH"),
        ((q, k, weight, start.float(), end), "key_start_T"),
        ((q, k, weight, start, end + 1), "key_end_T"),
        ((q, torch.empty(16, 9).t(), weight, start, end), "k_SD"),
        ((q, k, weight, start, end, torch.ones(3)), "q_scale_TH"),
    ]:
        with pytest.raises(ValueError, match=name):
            indexer_scores(*arguments)
    for slots in (0, 4097):
        with pytest.raises(ValueError, match="k:"):
            indexer_topk(q, k, weight, start, end, slots)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"sequence_T": torch.tensor([4])}, "sequence_T"),
        ({"key_end_T": torch.tensor([500])}, "key_end_T"),
        ({"page_table_NP": torch.full((1, 9), 99, dtype=torch.int32)}, "page_table_NP"),
        ({"page_table_NP": torch.zeros(1, 9)}, "page_table_NP"),
    ],
)
def test_bad_paged_arguments(change: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        paged_indexer_topk(**(paged_case([[30]], page_size=4, heads=2, dim=16) | change), k=3)


def requests(capability: int) -> list[dict]:
    """Production shapes of the scores, fused and paged kernels for one generation."""
    tile = {"STAGES": 3, "UPCAST": False, "HEADS": 64, "P": 64, "DIM": 128, "DESCRIBED": False}
    base = dict.fromkeys(["weight_ptr", "q_scale_ptr", "k_scale_ptr", "out_score_ptr", "chunk_ptr"], "*fp32")
    base |= {"out_row_ptr": "*i32"}
    base |= dict.fromkeys(["start_ptr", "end_ptr", "chosen_ptr", "table_ptr", "out_position_ptr", "length_ptr"], "*i32")
    base |= {"buffer_ptr": "*i64", "sequence_ptr": "*i64", "out_ptr": "*fp32"}
    names = "tokens keys window splits q_stride k_stride out_stride table_stride sequences pages page_stride"
    base |= dict.fromkeys([*names.split(), "scale_page_stride", "k", "limit"], "i32")
    result = []
    for kind in ("bf16", "fp8e4nv") if capability > 80 else ("bf16",):
        typed = base | dict.fromkeys(["q_ptr", "k_ptr", "k_tiles"], f"*{kind}")
        no_scale = {} if kind == "fp8e4nv" else {"q_scale_ptr": None, "k_scale_ptr": None}
        rows = {"M": 64, "B": 4 if kind == "fp8e4nv" else 2} if capability == 90 else {"M": 32, "B": 2}
        buffers = {
            "CAPACITY": 8192,
            "R": 4,
            "W": 128,
            "SAMPLE": 2048,
            "SIGMAS": 7.0,
            "PIECES": 2,
            "GUESS_FROM": 16384,
            "PAGE": 64,
        }
        one_piece = dict.fromkeys(["table_ptr", "sequence_ptr", "out_score_ptr", "chosen_ptr", "out_row_ptr"])
        paged = {"start_ptr": None, "length_ptr": None, "B": 1, "M": 128 if capability == 90 else 32}
        for function, constants in [
            ("kernels.indexer_scores.triton:indexer_scores_kernel", tile | rows | no_scale | {"FILL": True}),
            ("kernels.indexer_topk.triton:indexer_topk_kernel", tile | rows | buffers | no_scale | one_piece),
            ("kernels.indexer_topk.triton:indexer_topk_kernel", tile | rows | buffers | no_scale | paged),
        ]:
            result.append(
                {
                    "function": function,
                    "arguments": typed,
                    "constants": constants,
                    "options": {"num_warps": 4},
                    "capability": capability,
                }
            )
    return result


def hopper_request(kind: str, mode: str) -> dict:
    """The Gluon score kernel: all scores, those of sampled keys, or lists of those above a threshold."""
    from triton.experimental.gluon import language as gl

    bits = 8 if kind == "fp8e4nv" else 16
    shared = gl.NVMMASharedLayout(128, bits, 2)
    arguments = {name: f"tensordesc<{kind}[{rows}, {1024 // bits}],{shared!r}>" for name, rows in
                 (("q_tiles", 256), ("k_tiles", 16))}  # fmt: skip
    arguments |= dict.fromkeys(["weight_ptr", "q_scale_ptr", "k_scale_ptr", "threshold_ptr"], "*fp32")
    arguments |= dict.fromkeys(["start_ptr", "end_ptr", "chosen_ptr", "count_ptr"], "*i32")
    arguments |= dict.fromkeys(["tokens", "keys", "out_stride", "nought"], "i32")
    arguments["out_ptr"] = "*i64" if mode == "lists" else "*fp32"
    constants = {"PERIOD": 64 if mode == "sample" else 1, "STAGES": 6 if bits == 8 else 3, "FILL": mode == "scores"}
    constants |= {"EARLY": int(mode == "lists"), "IN_TURN": mode == "lists" and bits == 8}
    constants["SLOTS"] = 8192 if mode == "lists" else 0
    constants |= dict.fromkeys([] if bits == 8 else ["q_scale_ptr", "k_scale_ptr"])
    constants |= dict.fromkeys(["chosen_ptr"] if mode == "lists" else ["threshold_ptr", "count_ptr"])
    return {
        "function": "kernels.indexer_scores.gluon:indexer_scores_hopper_kernel",
        "arguments": arguments,
        "constants": constants,
        "options": {"num_warps": 4, "maxnreg": 168},
        "capability": 90,
    }


@pytest.mark.slow
def test_hopper_kernel_compiles_ahead() -> None:
    cases = [(kind, mode) for kind in ("bf16", "fp8e4nv") for mode in ("scores", "sample", "lists")]
    for case, got in zip(cases, compile_all([hopper_request(*case) for case in cases]), strict=True):
        assert got["shared"] <= 232_448
        assert got["stack"] <= 16, case  # four registers, outside of the loop over tiles
        products = (8 if case[0] == "bf16" else 4) * (2 if case[1] == "lists" else 1)
        assert got["instructions"]["wgmma.mma_async"] == 2 * products, case
        assert got["instructions"]["setmaxnreg"] > 0


@interpreter_only
@pytest.mark.parametrize("kind", ["normal", "ties", "one list", "few"])
def test_selection_from_lists(kind: str) -> None:
    """Lists as the Gluon kernel writes them: four quarters of the keys, each in order, and what a list cannot hold."""
    rows, keys, k, size = 5, 160, 16, 64
    scores_TS = torch.randn(rows, keys, generator=torch.Generator().manual_seed(3))
    if kind == "ties":
        scores_TS = (scores_TS * 2).round()
    if kind == "one list":
        scores_TS[:, 40:] -= 9
    if kind == "few":
        scores_TS[:, 9:] = -torch.inf
    threshold_T = scores_TS.sort(1, descending=True).values[:, 47]
    threshold_T[0] = scores_TS[0].max()  # too high
    threshold_T[1] = scores_TS[1].min() - 1  # lets more pass than there is room for
    lists_TLC, counts_TL = torch.full((rows, 4, size), -1), torch.zeros(rows, 4, dtype=torch.int32)
    for row in range(rows):
        for place in range(4):
            position = torch.arange(place * 40, place * 40 + 40)
            position = position[scores_TS[row, position] > threshold_T[row]]
            counts_TL[row, place] = len(position)
            bits = scores_TS[row, position].view(torch.int32).long() << 32
            lists_TLC[row, place, : len(position)] = bits | position
    indices_TK, lengths_T = torch.full((rows, k), -7, dtype=torch.int32), torch.full((rows,), -7, dtype=torch.int32)
    failed_T = torch.full((rows,), -7, dtype=torch.int32)
    selection_kernels.select_from_lists_kernel[(rows,)](
        lists_TLC,
        counts_TL,
        threshold_T,
        indices_TK,
        None,
        lengths_T,
        failed_T,
        None,
        None,
        1,
        0,
        k,
        PAGE=1,
        LISTS=4,
        SLOTS=size,
        R=2,
        W=4,
    )
    count_T = counts_TL.sum(1)
    assert torch.equal(failed_T > 0, (count_T > size) | ((count_T < k) & (threshold_T > -torch.inf)))
    assert failed_T[0] == 1
    want_TK, want_T = topk_reference.topk(scores_TS, k)
    right = failed_T == 0
    assert right.any() or kind == "few"
    assert torch.equal(indices_TK[right], want_TK[right])
    assert torch.equal(lengths_T[right], want_T[right])


@interpreter_only
def test_thresholds_from_sampled_keys() -> None:
    rows, keys, period, k, room = 4, 2048, 4, 64, 256
    scores_TS = torch.randn(rows, keys, generator=torch.Generator().manual_seed(4))
    start_T, end_T = torch.tensor([0, 300, 700, 5]), torch.tensor([keys, 1800, 900, 5])
    threshold_T = torch.empty(rows)
    selection_kernels.threshold_kernel[(rows,)](
        scores_TS[:, period // 2 :: period].contiguous(), start_T, end_T, threshold_T, keys, keys // period, k, room,
        SAMPLE=keys // period, PERIOD=period,
    )  # fmt: skip
    assert (threshold_T[2:] == -torch.inf).all()  # few keys: all of them pass
    for row in range(2):
        passed = int((scores_TS[row, start_T[row] : end_T[row]] > threshold_T[row]).sum())
        assert k < passed < 8 * k


@interpreter_only
def test_selection_by_threshold_around_the_hopper_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the Gluon kernel itself, which a stand-in replaces: guesses that hold and that fail, in several parts."""

    def launch(
        q_THD, k_SD, weight_TH, start_T, end_T, q_scale_TH, k_scale_S, out,
        *, period=1, windows=1, chosen_T=None, threshold_T=None, counts_TL=None,
    ):  # fmt: skip
        scores_TS = scores_reference.indexer_scores(q_THD, k_SD, weight_TH, start_T, end_T, q_scale_TH, k_scale_S)
        if threshold_T is None:
            sampled_TS = scores_TS[:, period // 2 :: period]
            chosen = torch.ones(len(out), dtype=torch.bool) if chosen_T is None else chosen_T > 0
            out[chosen, : sampled_TS.shape[1]] = sampled_TS[chosen]
            return
        for row in range(len(out)):
            quarter = -(-scores_TS.shape[1] // 4)
            for place in range(4):
                position = torch.arange(place * quarter, min((place + 1) * quarter, scores_TS.shape[1]))
                position = position[scores_TS[row, position] > threshold_T[row]]
                counts_TL[row, place] = len(position)
                candidates = scores_TS[row, position].view(torch.int32).long() << 32 | position
                out[row, place, : min(len(position), out.shape[2])] = candidates[: out.shape[2]]

    monkeypatch.setattr(selection_kernels.gluon, "launch", launch)
    inputs = list(last_queries(5, 9000, 2, 16, torch.float32))
    inputs[0][1] = 0  # a row of equal scores
    inputs[3][2], inputs[4][3] = 8000, 0  # few keys, none
    failed: list[torch.Tensor] = []
    got = selection_kernels.by_threshold(*inputs[:5], 50, *inputs[5:], failed=failed, memory_bytes=2 * 8 * 4 * 4096)
    want = topk_reference.topk(scores_reference.indexer_scores(*inputs), 50)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert torch.cat(failed).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("capability, shared", [(80, 166_912), (89, 101_376), (90, 232_448)])
def test_compiles_ahead(capability: int, shared: int) -> None:
    results = compile_all(requests(capability))
    assert all(result["shared"] <= shared for result in results)
    if capability == 90:
        assert all(result["instructions"]["wgmma.mma_async"] > 0 for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-5), (torch.bfloat16, 5e-3), (FP8, 3e-2)])
@pytest.mark.parametrize(
    "tokens, keys, heads, dim", [(70, 1100, 64, 128), (1, 1, 32, 128), (33, 257, 3, 64), (1203, 8201, 64, 128)]
)
def test_card_scores(dtype: torch.dtype, bar: float, tokens: int, keys: int, heads: int, dim: int) -> None:
    inputs = tuple(x.cuda() if x is not None else None for x in last_queries(tokens, keys, heads, dim, dtype))
    inputs[3][tokens // 2 + 1 :] = keys // 3
    inputs[4][tokens // 2 + 1 : tokens // 2 + 2] = 0
    assert error(indexer_scores(*inputs).cpu(), scores_reference.indexer_scores(*double(inputs))) <= bar


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize(
    "tokens, keys, k",
    [(70, 40000, 2048), (5, 100, 2048), (300, 30001, 512), (3, 65536, 4096), (1203, 20001, 2048), (1500, 35000, 4096)],
)
def test_card_fused_selection_equals_scores_then_topk(dtype: torch.dtype, tokens: int, keys: int, k: int) -> None:
    inputs = [x.cuda() if x is not None else None for x in last_queries(tokens, keys, 64, 128, dtype)]
    inputs[3][tokens // 2 :] = keys // 3  # two sequences
    got = indexer_topk(*inputs[:5], k, *inputs[5:])
    want = topk_reference.topk(indexer_scores(*inputs).cpu(), k)
    assert torch.equal(got[0].cpu(), want[0])
    assert torch.equal(got[1].cpu(), want[1])
    assert all(torch.equal(indexer_topk(*inputs[:5], k, *inputs[5:])[0], got[0]) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
@pytest.mark.parametrize("kind", ["plateau", "clusters", "ascending", "all equal", "short ranges"])
def test_card_selection_by_threshold_of_difficult_rows(dtype: torch.dtype, kind: str) -> None:
    """A guess that fails leaves its query to the full scores; packed ranges, some of them empty."""
    tokens, keys, k = 1203, 20001, 1024
    inputs = [x.cuda() if x is not None else None for x in last_queries(tokens, keys, 64, 128, dtype)]
    place = torch.arange(keys, device="cuda")[:, None]
    wide = inputs[1].float()
    if kind == "plateau":
        inputs[2], wide = inputs[2].abs(), torch.where(place > 700, 0, wide)
    if kind == "clusters":  # where no key is sampled
        wide = torch.where(place % 64 < 16, wide, 0.01 * wide)
    if kind == "ascending":
        wide = wide[:1].abs() * place / keys
    if kind == "all equal":
        wide = wide[:1].expand(keys, -1)
        inputs[6] = None if inputs[6] is None else torch.ones_like(inputs[6])
    if kind == "short ranges":
        inputs[3] = (torch.arange(tokens, device="cuda") * 7919) % (keys - 100)
        inputs[4] = torch.minimum(inputs[3] + torch.arange(tokens, device="cuda") * 20, inputs[4])
    inputs[1] = wide.to(dtype)
    failed: list[torch.Tensor] = []
    got = selection_kernels.by_threshold(*inputs[:5], k, *inputs[5:], failed=failed)
    want = topk_reference.topk(indexer_scores(*inputs).cpu(), k)
    assert torch.equal(got[0].cpu(), want[0])
    assert torch.equal(got[1].cpu(), want[1])
    assert bool(torch.cat(failed).any()) == (kind in ("plateau", "clusters", "all equal"))
    assert all(torch.equal(indexer_topk(*inputs[:5], k, *inputs[5:])[0], got[0]) for _ in range(20))


@pytest.mark.gpu
def test_card_nano_model_shapes() -> None:
    inputs = tuple(x.cuda() if x is not None else None for x in last_queries(100, 100, 8, 32, torch.bfloat16))
    got = indexer_topk(*inputs[:5], 32)
    want = fused_reference.indexer_topk(*double(inputs)[:5], 32)
    assert (
        float((got[0].cpu() == want[0]).float().mean()) > 0.98
    )  # bf16 scores of the reference differ in rounding only


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_card_paged_selection_with_interleaved_scales(dtype: torch.dtype) -> None:
    case = paged_case([[900, 901], [30000], [0], [64], [2500]], page_size=64, heads=64, dim=128)
    case = {name: t.float() if t.dtype == torch.float64 else t for name, t in case.items()}
    case["q_THD"] = case["q_THD"].to(dtype)
    pages = case["k_cache_PSD"].shape[0]
    device_case = {name: t.cuda() for name, t in case.items()}
    if dtype == FP8:  # 64 keys of 128 bytes, then their 64 scales
        raw = torch.zeros(pages, 64 * 132, dtype=torch.uint8, device="cuda")
        keys = raw[:, : 64 * 128].view(FP8).view(pages, 64, 128)
        scale = raw[:, 64 * 128 :].view(torch.float32)
        keys.copy_(case["k_cache_PSD"].to(FP8))
        scale.copy_(torch.rand(pages, 64) + 0.5)
        device_case |= {"k_cache_PSD": keys, "k_scale_PS": scale}
    else:
        device_case["k_cache_PSD"] = case["k_cache_PSD"].to(dtype).cuda()
    rows_TK, positions_TK, lengths_T = paged_indexer_topk(**device_case, k=512)
    want = paged_reference.paged_indexer_topk(**{name: t.cpu() for name, t in device_case.items()}, k=512)
    assert torch.equal(lengths_T.cpu(), want[2])
    assert overlap(positions_TK, want[1]) > 0.98
    page = device_case["page_table_NP"][device_case["sequence_T"]].gather(1, positions_TK.clamp(min=0).long() // 64)
    mapped = torch.where(positions_TK < 0, -1, page * 64 + positions_TK % 64)
    assert torch.equal(rows_TK, mapped.int())


def whole_numbers(tokens: int, pages: int, kind: str) -> dict[str, torch.Tensor]:
    """Decoding of `tokens` sequences of `pages` pages with small whole numbers, whose scores are exact in any order of
    summation, and full of ties."""
    generator = torch.Generator("cuda").manual_seed(tokens)
    draw = partial(torch.randint, device="cuda", generator=generator)
    q_THD, keys = draw(-2, 3, (tokens, 64, 128)), draw(-2, 3, (tokens * pages, 64, 128))
    weight_TH, scale = draw(-3, 4, (tokens, 64)), 2 ** draw(0, 2, (tokens * pages, 64))
    table_NP = torch.randperm(tokens * pages, device="cuda", generator=generator).view(tokens, pages)
    end_T = torch.full((tokens,), pages * 64, device="cuda")
    if kind == "plateau":  # fewer than k scores above 0
        weight_TH = weight_TH.abs()
        keys[table_NP[:, 8:]] = 0
    if kind == "clusters":  # where no position is sampled
        keys = torch.where(torch.arange(64, device="cuda")[:, None] < 16, keys, keys % 2)
    if kind == "ragged":
        end_T = (end_T * torch.rand(tokens, device="cuda", generator=generator)).long()
        end_T[:3] = torch.tensor([0, 77, pages * 64 - 1])
    raw = torch.zeros(tokens * pages, 64 * 132, dtype=torch.uint8, device="cuda")
    k_cache_PSD = raw[:, : 64 * 128].view(FP8).view(-1, 64, 128)
    k_cache_PSD.copy_(keys.half().to(FP8))
    raw[:, 64 * 128 :].view(torch.float32).copy_(scale)
    case = dict(q_THD=q_THD.half().to(FP8), k_cache_PSD=k_cache_PSD, weight_TH=weight_TH.float(), key_end_T=end_T)
    case |= dict(page_table_NP=table_NP.int(), sequence_T=torch.arange(tokens, device="cuda"))
    return case | {"k_scale_PS": raw[:, 64 * 128 :].view(torch.float32)}


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [None, 1, 4])
@pytest.mark.parametrize("kind", ["random", "plateau", "clusters", "ragged", "no scales"])
def test_card_paged_selection_by_threshold_is_exact(kind: str, splits: int | None) -> None:
    tokens, pages, k = 40, 300, 1024
    case = whole_numbers(tokens, pages, kind)
    if kind == "no scales":
        case["k_scale_PS"] = None
    assert paged_selection_kernels.supports(case["q_THD"], case["k_cache_PSD"], case["page_table_NP"], k)
    failed: list[torch.Tensor] = []
    # room for 24 tokens at a time
    memory = 24 * 8 * 8 * (splits or 2) * selection_kernels.slots_of_lists(k)
    options = {"splits": splits, "failed": failed, "memory_bytes": memory}
    rows_TK, positions_TK, lengths_T = paged_selection_kernels.by_threshold(**case, k=k, **options)
    for token in range(tokens):
        page = case["page_table_NP"][token].long()
        keys_SD = case["k_cache_PSD"][page].view(-1, 128)[: case["key_end_T"][token]].float()
        score_S = torch.relu(keys_SD @ case["q_THD"][token].float().T) @ case["weight_TH"][token]
        if case["k_scale_PS"] is not None:
            score_S *= case["k_scale_PS"][page].flatten()[: len(score_S)]
        want = score_S.sort(descending=True, stable=True).indices[:k].sort().values
        assert int(lengths_T[token]) == len(want)
        assert torch.equal(positions_TK[token, : len(want)].long(), want)
        assert (positions_TK[token, len(want) :] == -1).all()
    assert bool(torch.cat(failed).any()) == (kind in ("plateau", "clusters"))
    for _ in range(20):
        again = paged_indexer_topk(**case, k=k)
        assert torch.equal(again[0], rows_TK)
        assert torch.equal(again[1], positions_TK)
    place_TK = positions_TK.clamp(min=0).long()
    want_TK = case["page_table_NP"].gather(1, place_TK // 64) * 64 + place_TK % 64
    assert torch.equal(rows_TK, torch.where(positions_TK < 0, -1, want_TK).int())


@interpreter_only
def test_paged_selection_by_threshold_around_the_hopper_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the Gluon kernel itself, which a stand-in replaces: a guess that holds, one that fails, few keys."""

    def launch(
        q_THD, k_cache_PSD, weight_TH, table_NP, sequence_T, end_T, _q_scale, _k_scale, sample_TS, wanted, threshold_T,
        lists_TLC, counts_TL,
    ):  # fmt: skip
        lists = lists_TLC.shape[1]
        for row in range(len(q_THD)):
            sampled = int(end_T[row]) // 64
            ranked = sample_TS[row, :sampled].sort(descending=True).values
            guessed = sampled > wanted and end_T[row] > lists_TLC.shape[2]
            threshold_T[row] = ranked[wanted] - 0.5 if guessed else -torch.inf
            keys_SD = k_cache_PSD[table_NP[sequence_T[row]].long()].flatten(0, 1)[: end_T[row]].float()
            score_S = torch.relu(keys_SD @ q_THD[row].float().T) @ weight_TH[row]
            run = -(-len(score_S) // (64 * lists)) * 64
            for place in range(lists):
                position = torch.arange(place * run, max(place * run, min((place + 1) * run, len(score_S))))
                position = position[score_S[position] > threshold_T[row]]
                counts_TL[row, place] = len(position)
                lists_TLC[row, place, : len(position)] = score_S[position].view(torch.int32).long() << 32 | position

    monkeypatch.setattr(paged_selection_kernels, "launch", launch)
    generator = torch.Generator().manual_seed(5)
    draw = partial(torch.randint, -2, 3, generator=generator)
    case = dict(q_THD=draw((4, 64, 128)).float(), k_cache_PSD=draw((400, 64, 128)).float())
    case["q_THD"][1] = 0  # a row of equal scores
    case |= dict(weight_TH=draw((4, 64)).float(), key_end_T=torch.tensor([9000, 8300, 100, 0]))
    case |= dict(sequence_T=torch.tensor([1, 0, 1, 1]), page_table_NP=torch.randperm(400, generator=generator)[:300])
    case["page_table_NP"] = case["page_table_NP"].view(2, 150).int()
    failed: list[torch.Tensor] = []
    got = paged_selection_kernels.by_threshold(**case, k=30, failed=failed, splits=2, memory_bytes=3 * 8 * 16 * 4096)
    want = paged_reference.paged_indexer_topk(**case, k=30)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert torch.cat(failed).tolist() == [0, 1, 0, 0]


@pytest.mark.slow
def test_paged_hopper_kernel_compiles_ahead() -> None:
    from triton.experimental.gluon import language as gl

    shared = gl.NVMMASharedLayout(128, 8, 2)
    arguments = {name: f"tensordesc<fp8e4nv[{rows}, 128],{shared!r}>" for name, rows in
                 (("q_tile", 64), ("k_tiles", 16))}  # fmt: skip
    scores = ["weight_ptr", "q_scale_ptr", "scale_ptr", "threshold_ptr", "sample_ptr"]
    arguments |= dict.fromkeys(scores, "*fp32") | dict.fromkeys(["table_ptr", "count_ptr"], "*i32")
    arguments |= dict.fromkeys(["sequence_ptr", "end_ptr"], "*i64")
    names = "sequences table_pages table_stride cache_pages rows_of_page scale_stride sample_stride wanted"
    arguments |= dict.fromkeys(names.split(), "i32") | {"list_ptr": "*i64"}
    request = dict(function="kernels.paged_indexer_topk.gluon:paged_lists_hopper_kernel", arguments=arguments)
    request["constants"] = dict(SPLITS=2, SLOTS=8192, SAMPLE=2048, PERIOD=64)
    request |= dict(options=dict(num_warps=4, maxnreg=168), capability=90)
    (got,) = compile_all([request])
    assert got["shared"] <= 232_448
    assert got["stack"] == 0
    assert got["instructions"]["wgmma.mma_async"] == 32  # four of 32 columns a tile, four tiles, two groups
    assert got["instructions"]["setmaxnreg"] > 0
