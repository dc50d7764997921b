"""LayerNorm, RoPE, quantisation and cache write of indexer keys and queries, against the bytes at copy speed."""

import torch

from kernels.benchmarks.measure import Context, milliseconds, row
from kernels.preparation import prepare, prepare_into_cache

TOKENS, HEADS, DIM, FREQUENCIES, PAGE = 65536, 64, 128, 32, 64


def rows(context: Context) -> list[dict]:
    if "fp8" not in context.ceilings:
        return []
    device = context.device
    angle = torch.rand(TOKENS, FREQUENCIES, device=device)
    cos, sin = angle.cos(), angle.sin()
    norm_weight, norm_bias = torch.randn(DIM, device=device), torch.randn(DIM, device=device)
    x = torch.randn(TOKENS, HEADS, DIM, device=device, dtype=torch.bfloat16)
    ms = milliseconds(lambda: prepare(x, cos, sin, fp8=True))
    rotation = TOKENS * FREQUENCIES * 8
    share = (x.numel() * 3 + TOKENS * HEADS * 4 + rotation) / ms / 1e6 / context.ceilings["copy"]
    found = [row("preparation, queries", f"{TOKENS} x 64 x 128", "bf16 to fp8", ms, "copy", share, None, None, True)]
    cache = torch.zeros(TOKENS // PAGE, PAGE * (DIM + 4), device=device, dtype=torch.uint8)
    keys = cache[:, : PAGE * DIM].view(torch.float8_e4m3fn).view(-1, PAGE, DIM)
    scales = cache[:, PAGE * DIM :].view(torch.float32)
    target = torch.randperm(TOKENS, device=device)
    key = x[:, 0].contiguous()

    def write() -> None:
        prepare_into_cache(key, cos, sin, keys, scales, target, norm_weight_D=norm_weight, norm_bias_D=norm_bias)

    ms = milliseconds(write)
    share = (key.numel() * 3 + TOKENS * 12 + rotation) / ms / 1e6 / context.ceilings["copy"]
    found.append(
        row("preparation, keys to cache", f"{TOKENS} x 128", "bf16 to fp8", ms, "copy", share, None, None, True)
    )
    return found
