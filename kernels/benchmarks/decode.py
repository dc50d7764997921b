"""Attention of one decoding step of 64 sequences of 128K tokens; with GQA the whole step against dense decoding. What
launches several kernels is timed as a CUDA graph."""

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.benchmarks.fused import paged_selection
from kernels.benchmarks.measure import Context, graphed, milliseconds, row
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
        ms = milliseconds(graphed(partial(sparse_decode, q, cache, selected, 576**-0.5, 512)))
        share = BATCH * KEEP * 656 / ms / 1e6 / context.ceilings["copy"]
        shape = f"batch {BATCH} S=128K K={KEEP} fp8"
        found.append(row(f"sparse decode H={heads}", shape, "uniform", ms, "copy", share, None, None, True))
    return found


def gqa_rows(context: Context) -> list[dict]:
    """32 query heads, 8 key-value heads of 128, bf16: the whole step against dense decoding, where there is room for
    34 GB of keys and values. Both read the same memory, which is random: as pages, and as one piece a head."""
    device, heads, groups, dim = context.device, 32, 8, 128
    elements = BATCH * LENGTH * groups * dim
    if "fp8" not in context.ceilings or torch.cuda.mem_get_info(device)[0] < 4.5 * elements:
        return []
    k, v = (torch.randn(elements, device=device, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(BATCH, heads, dim, device=device, dtype=torch.bfloat16)
    k_pages, v_pages = (x.view(-1, PAGE, groups, dim) for x in (k, v))
    k_dense, v_dense = (x.view(BATCH, groups, LENGTH, dim) for x in (k, v))
    select, _ = paged_selection(device)
    selected = select()

    def dense() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q.unsqueeze(2), k_dense, v_dense, enable_gqa=True)

    def sparse(rows_TK: torch.Tensor) -> torch.Tensor:
        return sparse_decode_gqa(q, k_pages, v_pages, rows_TK, dim**-0.5)[0]

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.no_grad():
        dense_ms = milliseconds(dense)
    alone_ms = milliseconds(graphed(lambda: sparse(selected)))
    whole_ms = milliseconds(graphed(lambda: sparse(select())))
    shape = f"batch {BATCH} S=128K K={KEEP}, {heads} / {groups} heads of {dim}"
    share = BATCH * KEEP * groups * dim * 4 / alone_ms / 1e6 / context.ceilings["copy"]
    dense_share = 4 * elements / dense_ms / 1e6 / context.ceilings["copy"]
    return [
        row("sparse decode GQA", shape, "its own", alone_ms, "copy", share, None, None, True),
        row("dense decode GQA, cuDNN", shape, "all", dense_ms, "copy", dense_share, 0.80, None, True),
        row("decode GQA whole", shape, "its own", whole_ms, "dense decode", dense_ms / whole_ms, 8.0, 14.0, True),
    ]
