"""Rotary position embedding, plain and YaRN, in both layouts that DSA needs.

MLA rotates interleaved pairs (x0, x1), (x2, x3), ...; the lightning indexer rotates half-split pairs (x0, x_{D/2}), ...
Mixing the two up is the best-known DSA bug: it costs quality and raises no error.
Shape suffixes: T tokens, H heads, D dimension of the rotary part.
"""

from __future__ import annotations

import math

import torch

from model.config import ModelConfig, RopeParameters


def inverse_frequencies(parameters: RopeParameters, dim: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [dim / 2] (fp32, radians per token) and the factor on cos and sin.

    YaRN: arXiv 2309.00071, section 3.2 ("NTK-by-parts") and 3.4 (attention factor).
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float) / dim
    extrapolated = 1.0 / parameters.rope_theta**exponents
    if parameters.rope_type == "default":
        return extrapolated, 1.0
    if parameters.original_max_position_embeddings is None:
        raise ValueError("rope_parameters.original_max_position_embeddings is required with rope_type yarn")

    def dimension_of(rotations: float) -> float:
        trained = parameters.original_max_position_embeddings or 0
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(parameters.rope_theta))

    low, high = dimension_of(parameters.beta_fast), dimension_of(parameters.beta_slow)
    if parameters.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float) - low) / (high - low)).clamp(0, 1)
    frequencies = extrapolated / parameters.factor * ramp + extrapolated * (1 - ramp)
    return frequencies, _attention_factor(parameters)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _attention_factor(parameters: RopeParameters) -> float:
    if parameters.attention_factor is not None:
        return parameters.attention_factor
    if parameters.mscale and parameters.mscale_all_dim:
        return _mscale(parameters.factor, parameters.mscale) / _mscale(parameters.factor, parameters.mscale_all_dim)
    return _mscale(parameters.factor, 1.0)


def softmax_scale(config: ModelConfig) -> float:
    """MLA's softmax scale; YaRN with mscale_all_dim multiplies it by mscale^2. The indexer's scale has no mscale."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope.rope_type != "default" and rope.mscale_all_dim:
        scale *= _mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def cos_sin(
    position_T: torch.Tensor, frequencies: torch.Tensor, factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [T, D / 2] of each token's angles."""
    angle = position_T.to(frequencies.dtype)[:, None] * frequencies
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)


def rotate_interleaved(x_TxD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (x0, x1), (x2, x3), ...; the result holds all first elements, then all second ones.

    Queries and keys are laid out alike, so their dot products are those of the interleaved layout.
    `x_TxD` is [T, D] or [T, H, D].
    """
    if x_TxD.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    a, b = x_TxD[..., 0::2], x_TxD[..., 1::2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rotate_half_split(x_TxD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate pairs (x_i, x_{i + D/2}). `x_TxD` is [T, D] or [T, H, D]."""
    if x_TxD.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    a, b = x_TxD.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
