"""LayerNorm, RoPE, quantisation and cache write in plain PyTorch: the oracle, and what runs on a CPU.

Legend: T tokens, H heads, D head dim, F rope frequencies (half the rotated columns).
"""

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
SMALLEST_AMAX = 1e-4


def rotate(x_THD: Tensor, cos_TF: Tensor, sin_TF: Tensor, interleaved: bool, rope_first: bool) -> Tensor:
    """Rotates the pairs (2i, 2i+1), or without `interleaved` (i, i + F), of the first or last 2F columns."""
    width = 2 * cos_TF.shape[1]
    split = [width, x_THD.shape[2] - width]
    rope, rest = x_THD.split(split, dim=2) if rope_first else reversed(x_THD.split(split[::-1], dim=2))
    left, right = (rope[..., 0::2], rope[..., 1::2]) if interleaved else rope.chunk(2, dim=2)
    cos, sin = cos_TF[:, None].to(rope.dtype), sin_TF[:, None].to(rope.dtype)
    pair = (left * cos - right * sin, right * cos + left * sin)
    rope = torch.stack(pair, dim=-1).flatten(2) if interleaved else torch.cat(pair, dim=2)
    return torch.cat((rope, rest) if rope_first else (rest, rope), dim=2)


def quantise(y_THD: Tensor, power_of_two: bool) -> tuple[Tensor, Tensor]:
    """(e4m3 values, fp32 scale per row): y = values * scale; amax / 448, with `power_of_two` rounded up to one."""
    scale_TH = (y_THD.abs().amax(2).clamp(min=SMALLEST_AMAX) / LARGEST).float()
    if power_of_two:
        mantissa, exponent = torch.frexp(scale_TH)  # mantissa in [0.5, 1)
        scale_TH = torch.ldexp(torch.ones_like(scale_TH), exponent - (mantissa == 0.5).int())
    values = (y_THD / scale_TH[:, :, None].to(y_THD.dtype)).clamp(-LARGEST, LARGEST)
    return values.float().to(FP8), scale_TH


def prepare(
    x_THD: Tensor,
    cos_TF: Tensor,
    sin_TF: Tensor,
    norm_weight_D: Tensor | None,
    norm_bias_D: Tensor | None,
    eps: float,
    interleaved: bool,
    rope_first: bool,
    fp8: bool,
    power_of_two: bool,
) -> tuple[Tensor, Tensor | None]:
    """See `kernels.preparation.prepare`; arithmetic in fp32 (float64 in float64)."""
    dtype = torch.float64 if x_THD.dtype == torch.float64 else torch.float32
    y_THD = x_THD.to(dtype)
    if norm_weight_D is not None and norm_bias_D is not None:
        width = (x_THD.shape[2],)
        y_THD = torch.nn.functional.layer_norm(y_THD, width, norm_weight_D.to(dtype), norm_bias_D.to(dtype), eps)
    y_THD = rotate(y_THD, cos_TF, sin_TF, interleaved, rope_first)
    return quantise(y_THD, power_of_two) if fp8 else (y_THD.to(x_THD.dtype), None)
