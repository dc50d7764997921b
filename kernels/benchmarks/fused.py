"""Scores and selection in one operation, against our own score kernel; and over the paged cache in decoding."""

from collections.abc import Callable
from functools import partial

import torch

from kernels.benchmarks.indexer import DIM, HEADS, QUERIES, inputs, kinds
from kernels.benchmarks.measure import Context, graphed, interleaved, milliseconds, row
from kernels.indexer_scores import indexer_scores
from kernels.indexer_topk import indexer_topk
from kernels.paged_indexer_topk import paged_indexer_topk
from kernels.sparse_decode import pack_latent, sparse_decode

KEEP, BATCH, LENGTH, PAGE = 2048, 64, 131072, 64


def rows(context: Context) -> list[dict]:
    found = []
    for dtype, name in kinds(context):
        for keys in (32768, 131072):
            q, k, weight, start, end, q_scale, k_scale = inputs(keys, dtype, context.device)
            ms = interleaved(
                {
                    "scores": partial(indexer_scores, q, k, weight, start, end, q_scale, k_scale),
                    "fused": partial(indexer_topk, q, k, weight, start, end, KEEP, q_scale, k_scale),
                },
                repeat_ms=100,
            )
            bar, aim = (1.10, 1.03) if keys == 131072 else (None, None)
            shape = f"{QUERIES} queries, S={keys // 1024}K, k={KEEP}"
            ratio = ms["fused"] / ms["scores"]
            found.append(
                row(f"fused selection {name}", shape, "causal", ms["fused"], "score kernel", ratio, bar, aim, False)
            )
    return found + (decode(context) if "fp8" in context.ceilings else [])


def paged_selection(device: torch.device) -> tuple[Callable[[], torch.Tensor], int]:
    """Selection by 64 sequences of 128K over an fp8 index (132 bytes a key, pages of 64), and the bytes it reads."""
    pages = BATCH * LENGTH // PAGE
    index = torch.randint(0, 120, (pages, PAGE * (DIM + 4)), device=device, dtype=torch.uint8)
    keys = index[:, : PAGE * DIM].view(torch.float8_e4m3fn).view(pages, PAGE, DIM)
    scale = index[:, PAGE * DIM :].view(torch.float32)
    scale.uniform_(0.5, 1.5)
    table = torch.randperm(pages, device=device).view(BATCH, -1).int()
    query = torch.randn(BATCH, HEADS, DIM, device=device).to(torch.float8_e4m3fn)
    weight = torch.randn(BATCH, HEADS, device=device)
    sequence, end = torch.arange(BATCH, device=device), torch.full((BATCH,), LENGTH, device=device)

    def select() -> torch.Tensor:
        return paged_indexer_topk(query, keys, weight, table, sequence, end, KEEP, None, scale)[0]

    return select, BATCH * LENGTH * (DIM + 4)


def decode(context: Context) -> list[dict]:
    """One step of 64 sequences of 128K with a latent cache in fp8 (656 bytes a key), as a CUDA graph; and launched
    kernel by kernel, which is the host's time where that is slow."""
    device = context.device
    select, read = paged_selection(device)
    latent = pack_latent(torch.randn(4096, PAGE, 576, device=device, dtype=torch.bfloat16))
    cache = latent.repeat(BATCH * LENGTH // PAGE // 4096, 1, 1)
    q = torch.randn(BATCH, 128, 576, device=device, dtype=torch.bfloat16)
    shape = f"batch {BATCH} S=128K k={KEEP} fp8"
    ms = milliseconds(graphed(select))
    share = read / ms / 1e6 / context.ceilings["copy"]
    found = [row("decode: scores + top-k", shape, "its own", ms, "copy", share, None, None, True)]

    def step() -> torch.Tensor:
        return sparse_decode(q, cache, select(), 576**-0.5, 512)[0]

    for title, run, bar, aim in (
        ("decode MLA whole H=128", graphed(step), 0.60, 0.80),
        ("decode MLA whole H=128, kernel by kernel", step, None, None),
    ):
        ms = milliseconds(run)
        share = (read + BATCH * KEEP * 656) / ms / 1e6 / context.ceilings["copy"]
        found.append(row(title, shape, "its own", ms, "copy", share, bar, aim, True))
    return found
