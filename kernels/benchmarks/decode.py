"""One decoding step of 64 sequences of 128K tokens: scores and selection over the paged index, then sparse
attention."""

from functools import partial

import torch

from kernels.benchmarks.measure import Context, milliseconds, row
from kernels.sparse_decode import pack_latent, sparse_decode, sparse_decode_gqa

BATCH, LENGTH, KEEP, PAGE = 64, 131072, 2048, 64


def rows(context: Context) -> list[dict]:
    return latent_rows(context) + gqa_rows(context)


def some_rows(length: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(0)
    chosen = torch.rand(BATCH, length, device=device, generator=generator).topk(KEEP).indices.sort(-1).values
    return (chosen + torch.arange(BATCH, device=device).unsqueeze(1) * length).int()


def latent_rows(context: Context) -> list[dict]:
    device = context.device
    page_of = pack_latent(torch.randn(4096, PAGE, 576, device=device, dtype=torch.bfloat16))
    cache = page_of.repeat(BATCH * LENGTH // PAGE // 4096, 1, 1)
    selected = some_rows(LENGTH, device)
    found = []
    for heads in (128, 64, 16):
        q = torch.randn(BATCH, heads, 576, device=device, dtype=torch.bfloat16)
        ms = milliseconds(partial(sparse_decode, q, cache, selected, 576**-0.5, 512))
        share = BATCH * KEEP * 656 / ms / 1e6 / context.ceilings["copy"]
        shape = f"batch {BATCH} S=128K K={KEEP} fp8"
        found.append(row(f"sparse decode H={heads}", shape, "uniform", ms, "copy", share, None, None, True))
    return found


def gqa_rows(context: Context) -> list[dict]:
    """At an eighth of the length, so that the caches fit any card; the selected rows are as far apart as it allows."""
    device, length = context.device, LENGTH // 4
    k, v = (torch.randn(BATCH * length // PAGE, PAGE, 8, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(BATCH, 32, 128, device=device, dtype=torch.bfloat16)
    selected = some_rows(length, device)
    ms = milliseconds(lambda: sparse_decode_gqa(q, k, v, selected, 128**-0.5))
    share = BATCH * KEEP * 8 * 128 * 4 / ms / 1e6 / context.ceilings["copy"]
    shape = f"batch {BATCH} S=32K K={KEEP}, 32 / 8 heads of 128"
    found = [row("sparse decode GQA", shape, "uniform", ms, "copy", share, None, None, True)]
    dense = BATCH * LENGTH * 8 * 128 * 4 / (0.8 * context.ceilings["copy"] * 1e6)
    found.append(
        row(
            "sparse decode GQA, attention alone",
            "128K",
            "uniform",
            ms,
            "dense at 0.80 of copy",
            dense / ms,
            None,
            None,
            True,
        )
    )
    return found
