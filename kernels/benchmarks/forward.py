"""The forward of DSA attention over a whole sequence, H=128, against the dense attention that it replaces."""

import math

import torch

from kernels.benchmarks.attention import DIM, KEEP, SCALE, TOKENS, VALUE
from kernels.benchmarks.measure import Context, once, row
from kernels.indexer_topk import indexer_topk
from kernels.sparse_attention import sparse_attention


def dense_ms(length: int, context: Context) -> float:
    """cuDNN, causal, 128 heads, 192 / 128: the attention that DSA replaces."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k = (torch.randn(1, 128, length, 192, device=context.device, dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(1, 128, length, 128, device=context.device, dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), torch.no_grad():
        return once(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), 2)


def sparse_ms(length: int, context: Context) -> float:
    """Indexer in fp8, selection and attention of every query of one sequence, 4096 queries at a time, random inputs."""
    device = context.device
    kv = torch.randn(length, DIM, device=device, dtype=torch.bfloat16)
    index_k = torch.randn(length, 128, device=device).to(torch.float8_e4m3fn)
    q = torch.randn(TOKENS, 128, DIM, device=device, dtype=torch.bfloat16)
    index_q = torch.randn(TOKENS, 64, 128, device=device).to(torch.float8_e4m3fn)
    weight = torch.randn(TOKENS, 64, device=device)
    q_scale, k_scale = torch.ones(TOKENS, 64, device=device), torch.ones(length, device=device)
    start = torch.zeros(TOKENS, dtype=torch.int32, device=device)

    def forward() -> None:
        for first in range(0, length, TOKENS):
            end = torch.arange(first + 1, first + TOKENS + 1, dtype=torch.int32, device=device)
            indices, _ = indexer_topk(index_q, index_k, weight, start, end, KEEP, q_scale, k_scale)
            sparse_attention(q, kv, indices, SCALE, VALUE)

    return once(forward, 2)


def rows(context: Context) -> list[dict]:
    found = []
    break_even = math.inf
    lengths = (128, 32, 24, 20, 16, 12)
    for thousands in lengths:
        sparse, dense = sparse_ms(thousands * 1024, context), dense_ms(thousands * 1024, context)
        if sparse <= dense:
            break_even = thousands
        bar, aim = (3.7, 4.7) if thousands == 128 else (None, None)
        shape = f"one sequence of {thousands}K"
        found.append(row("DSA forward H=128", shape, "its own", sparse, "cuDNN dense", dense / sparse, bar, aim, True))
        torch.cuda.empty_cache()
    found.append(
        row("DSA forward H=128", "break-even length in K", "its own", 0.0, "cuDNN dense", break_even, 20.0, 16.0, False)
    )
    return found
