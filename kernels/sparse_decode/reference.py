"""Sparse attention over a paged cache in plain PyTorch, and the 656-byte rows of the quantised latent cache.

A row: 512 latent values in e4m3, 4 fp32 scales (one for 128 values), 64 rope values in bf16. It is FlashMLA's and
vLLM's `fp8_ds_mla` layout. Legend as in the package.
"""

import torch

from kernels.sparse_attention import reference as sparse_reference

LATENT, TILE, ROPE = 512, 128, 64
SCALES = LATENT // TILE
ROW_BYTES = LATENT + 4 * SCALES + 2 * ROPE
E4M3_MAX = 448.0


def pack_latent(kv_XD: torch.Tensor) -> torch.Tensor:
    """[..., 576] floats -> [..., 656] uint8; a scale is the power of two that brings its tile's maximum to 448 or
    less."""
    tiles = kv_XD[..., :LATENT].float().unflatten(-1, (SCALES, TILE))
    scales = torch.exp2(torch.ceil(torch.log2(tiles.abs().amax(-1).clamp(min=1e-4) / E4M3_MAX)))
    values = (tiles / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).flatten(-2).to(torch.float8_e4m3fn)
    rope = kv_XD[..., LATENT:].to(torch.bfloat16).contiguous()
    return torch.cat([values.view(torch.uint8), scales.contiguous().view(torch.uint8), rope.view(torch.uint8)], -1)


def unpack_latent(rows_XB: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., 656] uint8 -> [..., 576]; exact in bf16 and wider for power-of-two scales in range."""
    values = rows_XB[..., :LATENT].contiguous().view(torch.float8_e4m3fn).float().unflatten(-1, (SCALES, TILE))
    scales = rows_XB[..., LATENT : LATENT + 4 * SCALES].contiguous().view(torch.float32)
    rope = rows_XB[..., LATENT + 4 * SCALES :].contiguous().view(torch.bfloat16)
    return torch.cat([(values * scales.unsqueeze(-1)).flatten(-2).to(dtype), rope.to(dtype)], -1)


def _selected(cache_RX: torch.Tensor, rows_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The selected rows of a cache and indices into them: a cache is large, a selection is not."""
    used, inverse = torch.unique(rows_TK, return_inverse=True)
    skip = int(used.numel() > 0 and used[0] < 0)
    return cache_RX[used[skip:].long()], (inverse - skip).int()


@torch.no_grad()
def sparse_decode(q_THD, cache_PSX, rows_TK, scale: float, value_dim: int, sink_H) -> tuple[torch.Tensor, torch.Tensor]:
    kv_RD, indices_TK = _selected(cache_PSX.flatten(0, 1), rows_TK)
    if cache_PSX.dtype == torch.uint8:
        kv_RD = unpack_latent(kv_RD, q_THD.dtype)
    return sparse_reference.sparse_attention(q_THD, kv_RD, indices_TK, scale, value_dim, sink_H)


@torch.no_grad()
def sparse_decode_gqa(q_THD, k_cache, v_cache, rows_TK, scale: float, sink_H) -> tuple[torch.Tensor, torch.Tensor]:
    k_RGD, indices_TK = _selected(k_cache.flatten(0, 1), rows_TK)
    v_RGV, _ = _selected(v_cache.flatten(0, 1), rows_TK)
    return sparse_reference.sparse_attention_gqa(q_THD, k_RGD, v_RGV, indices_TK, scale, sink_H)
