"""Fused preparation: the reference against complex rotation and torch's LayerNorm, the kernel against the reference."""

import pytest
import torch

from kernels.preparation import prepare, prepare_into_cache, reference
from kernels.preparation import triton as kernels
from tests.kernels.ahead_of_time import compile_all

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(tokens: int, heads: int, dim: int, frequencies: int, dtype=torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens + dim)
    angle_TF = torch.rand(tokens, frequencies, generator=generator, dtype=torch.float64) * 6.0
    return {
        "x_THD": (3 * torch.randn(tokens, heads, dim, generator=generator, dtype=torch.float64) + 1).to(dtype),
        "cos_TF": angle_TF.cos().to(dtype),
        "sin_TF": angle_TF.sin().to(dtype),
        "norm_weight_D": torch.randn(dim, generator=generator, dtype=torch.float64).to(dtype),
        "norm_bias_D": torch.randn(dim, generator=generator, dtype=torch.float64).to(dtype),
    }


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rope_first", [True, False])
def test_reference_equals_complex_rotation(interleaved: bool, rope_first: bool) -> None:
    case = inputs(5, 2, 12, 3)
    y_THD, scale = prepare(**case, interleaved=interleaved, rope_first=rope_first)
    x = case["x_THD"]
    x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=0) + 1e-6).sqrt()
    x = x * case["norm_weight_D"] + case["norm_bias_D"]
    columns = list(range(6)) if rope_first else list(range(6, 12))
    pairs = [(columns[2 * i], columns[2 * i + 1]) if interleaved else (columns[i], columns[i + 3]) for i in range(3)]
    for i, (left, right) in enumerate(pairs):
        turn = torch.complex(case["cos_TF"][:, i, None], case["sin_TF"][:, i, None])
        turned = torch.complex(x[..., left], x[..., right]) * turn
        x[..., left], x[..., right] = turned.real, turned.imag
    assert scale is None
    torch.testing.assert_close(y_THD, x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_quantised_values_are_close_and_scales_minimal(power_of_two: bool) -> None:
    case = inputs(7, 3, 32, 8)
    case["x_THD"][2] = 0.0
    exact, _ = prepare(case["x_THD"], case["cos_TF"], case["sin_TF"])
    values, scale_TH = prepare(case["x_THD"], case["cos_TF"], case["sin_TF"], fp8=True, power_of_two=power_of_two)
    assert values.dtype == torch.float8_e4m3fn
    assert scale_TH is not None
    error = (values.double() * scale_TH[:, :, None] - exact).abs()
    assert bool((error <= exact.abs() / 16 + scale_TH[:, :, None] * 2.0**-10).all())
    smallest = exact.abs().amax(2).clamp(min=1e-4) / 448
    if power_of_two:
        assert torch.equal(scale_TH.log2(), scale_TH.log2().round())
        assert bool(((scale_TH >= smallest * (1 - 1e-6)) & (scale_TH < smallest * (2 + 1e-6))).all())
    else:
        torch.testing.assert_close(scale_TH.double(), smallest)


@pytest.mark.parametrize(
    "interleaved, rope_first, norm", [(True, True, True), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("heads, dim, frequencies", [(1, 128, 32), (5, 24, 8)])
def test_kernel_equals_reference(interleaved, rope_first, norm, heads, dim, frequencies) -> None:
    case = inputs(9, heads, dim, frequencies, torch.float32)
    if not norm:
        case |= {"norm_weight_D": None, "norm_bias_D": None}
    arguments = (*case.values(), 1e-6, interleaved, rope_first)
    want, _ = reference.prepare(*arguments, False, True)
    on_device = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments]
    got, _ = kernels.prepare(*on_device, False, True)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    values, scale_TH = kernels.prepare(*on_device, True, True)
    want_values, want_scale_TH = reference.prepare(*arguments, True, True)
    assert torch.equal(scale_TH.cpu(), want_scale_TH)
    # one step of e4m3 where rounding decides; Triton's interpreter loses the carry into the exponent (31.5 gives 16)
    step = want_values.float().abs() / (8 if DEVICE == "cuda" else 2) + 2.0**-9
    assert bool(((values.cpu().float() - want_values.float()).abs() <= step).all())


def test_cache_write_on_each_device_touches_its_rows_only() -> None:
    case = inputs(4, 1, 32, 8, torch.float32)
    x_TD, rest = case["x_THD"][:, 0], {k: v for k, v in case.items() if k != "x_THD"}
    row_T = torch.tensor([13, -1, 0, 6])
    raw = torch.full((4, 4 * 36), 77, dtype=torch.uint8)  # pages of 4 keys and then their scales
    expected = raw.clone()
    values, scale = prepare(x_TD[:, None], **rest, fp8=True)
    assert scale is not None
    for token, row in enumerate(row_T.tolist()):
        if row >= 0:
            page, offset = divmod(row, 4)
            expected[page, offset * 32 : offset * 32 + 32] = values[token, 0].view(torch.uint8)
            expected[page, 128 + offset * 4 : 132 + offset * 4] = scale[token].view(torch.uint8)
    for launcher in ("public", "kernel"):
        device = DEVICE if launcher == "kernel" else "cpu"
        cache = raw.clone().to(device)
        keys, scales = cache[:, :128].view(torch.float8_e4m3fn).view(4, 4, 32), cache[:, 128:].view(torch.float32)
        moved = {k: v.to(device) for k, v in rest.items()}
        if launcher == "public":
            prepare_into_cache(x_TD, moved["cos_TF"], moved["sin_TF"], keys, scales, row_T,
                               norm_weight_D=moved["norm_weight_D"], norm_bias_D=moved["norm_bias_D"])  # fmt: skip
            assert torch.equal(cache, expected)
        else:
            arguments = (*moved.values(), 1e-6, False, True, True, keys, scales, row_T.to(device))
            kernels.prepare_into_cache(x_TD.to(device), *arguments)
            # same bytes but for the rounding of values in the interpreter
            changed = cache.cpu() != raw
            assert bool((changed <= (expected != raw)).all())
            assert torch.equal(cache.cpu()[:, 128:], expected[:, 128:])


@pytest.mark.parametrize(
    "change, name",
    [
        ({"x_THD": torch.zeros(3, 8)}, "x_THD"),
        ({"cos_TF": torch.zeros(3, 5), "sin_TF": torch.zeros(3, 5)}, "cos_TF"),
        ({"sin_TF": torch.zeros(2, 2)}, "sin_TF"),
        ({"norm_bias_D": None}, "norm_weight_D"),
        ({"norm_weight_D": torch.zeros(9)}, "norm_weight_D"),
    ],
)
def test_bad_arguments(change: dict, name: str) -> None:
    case = inputs(3, 1, 8, 2, torch.float32) | change
    with pytest.raises(ValueError, match=name):
        prepare(**case)


def test_rows_out_of_range_are_refused() -> None:
    case = inputs(2, 1, 8, 2, torch.float32)
    cache = torch.zeros(2, 4, 8)
    with pytest.raises(ValueError, match="row_T"):
        prepare_into_cache(case["x_THD"][:, 0], case["cos_TF"], case["sin_TF"], cache, None, torch.tensor([0, 8]))


@pytest.mark.slow
def test_compiles_ahead_for_each_generation() -> None:
    pointers = ["x_ptr", "norm_weight_ptr", "norm_bias_ptr"]
    arguments = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(["cos_ptr", "sin_ptr", "scale_ptr"], "*fp32")
    numbers = ["rows", "cache_rows", "heads", "page_size", "page_stride", "out_stride", "scale_page_stride"]
    arguments |= dict.fromkeys([*numbers, "token_stride", "frequency_stride"], "i32")
    arguments |= {"row_ptr": "*i64", "eps": "fp32"}
    constants = {"DIM": 128, "D": 128, "F": 32, "R": 16, "INTERLEAVED": False, "ROPE_FIRST": True, "POWER_OF_TWO": True}
    requests = [
        {
            "function": "kernels.preparation.triton:prepare_kernel",
            "arguments": arguments | {"out_ptr": "*fp8e4nv" if capability > 80 else "*bf16"},
            "constants": constants | ({} if capability > 80 else {"scale_ptr": None}),
            "options": {"num_warps": 4},
            "capability": capability,
        }
        for capability in (80, 89, 90)
    ]
    assert all(result["shared"] <= 101_376 for result in compile_all(requests))
