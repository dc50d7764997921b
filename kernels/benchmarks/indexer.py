"""Indexer scores of 4096 queries (64 heads of 128) at the end of 4K, 32K and 128K keys, against the card's ceilings."""

from functools import partial
from typing import Any

import torch

from kernels.benchmarks.measure import Context, milliseconds, row
from kernels.indexer_scores import indexer_scores

QUERIES, HEADS, DIM = 4096, 64, 128
FP8 = torch.float8_e4m3fn


def inputs(keys: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """q, k, weight, key_start, key_end, q_scale, k_scale of normal random values; causal, the queries last."""
    generator = torch.Generator(device).manual_seed(keys)
    q, k, weight = (
        torch.randn(*shape, device=device, generator=generator)
        for shape in ((QUERIES, HEADS, DIM), (keys, DIM), (QUERIES, HEADS))
    )
    end = torch.arange(keys - QUERIES, keys, device=device, dtype=torch.int32) + 1
    scales: tuple[Any, ...] = (None, None)
    if dtype == FP8:
        scales = tuple(0.5 + torch.rand(*s, device=device, generator=generator) for s in ((QUERIES, HEADS), (keys,)))
    return q.to(dtype), k.to(dtype), weight * (HEADS * DIM) ** -0.5, torch.zeros_like(end), end, *scales


def operations(keys: int) -> float:
    """Floating-point operations of the causal pairs."""
    return 2.0 * HEADS * DIM * (QUERIES * (keys - QUERIES) + QUERIES * (QUERIES + 1) / 2)


def kinds(context: Context) -> list[tuple[torch.dtype, str]]:
    return [(torch.bfloat16, "bf16")] + ([(FP8, "fp8")] if "fp8" in context.ceilings else [])


def rows(context: Context) -> list[dict]:
    found = []
    for dtype, name in kinds(context):
        for keys in (4096, 32768, 131072):
            arguments = inputs(keys, dtype, context.device)
            ms = milliseconds(partial(indexer_scores, *arguments), 250)
            share = operations(keys) / ms / 1e9 / context.ceilings[name]
            bar, aim = (None, None) if keys == 4096 else (0.71, 0.80) if name == "fp8" else (0.75, 0.85)
            shape = f"{QUERIES} queries, S={keys // 1024}K, 64 x 128"
            found.append(row(f"indexer scores {name}", shape, "causal", ms, f"{name} ceiling", share, bar, aim, True))
    return found
