"""Launches every GPU kernel once on small, odd shapes, to be run under compute-sanitizer, which reports each access
out of bounds (PYTORCH_NO_CUDA_MEMORY_CACHING=1 gives every tensor an allocation of its own):

compute-sanitizer --tool memcheck --error-exitcode 9 python tests/kernels/every_kernel.py
"""

import torch

from kernels.indexer_scores import indexer_scores
from kernels.indexer_topk import indexer_topk
from kernels.paged_indexer_topk import paged_indexer_topk
from kernels.preparation import prepare, prepare_into_cache
from kernels.sparse_attention import sparse_attention, sparse_attention_gqa
from kernels.sparse_decode import pack_latent, sparse_decode, sparse_decode_gqa
from kernels.topk import topk

FP8 = torch.float8_e4m3fn


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def selection(tokens: int, rows: int, keep: int) -> torch.Tensor:
    """Ascending rows, the last one among them; token t has t * 7 of them at most."""
    chosen = torch.rand(tokens, rows, device="cuda").topk(keep).indices.sort(1).values.int()
    chosen[:, 0], chosen[-1, -1] = 0, rows - 1
    return torch.where(torch.arange(keep, device="cuda") < 7 * torch.arange(tokens, device="cuda")[:, None], chosen, -1)


def attention() -> None:
    for heads, dim, value_dim in ((128, 576, 512), (64, 512, 512), (16, 576, 512), (7, 576, 512), (5, 80, 64)):
        indices = selection(40, 333, 217)
        sparse_attention(draw(40, heads, dim), draw(333, dim), indices, 0.04, value_dim, draw(heads))
    sparse_attention(
        draw(3, 4, 24, dtype=torch.float32), draw(50, 24, dtype=torch.float32), selection(3, 50, 9), 0.2, 24
    )
    q, k = draw(40, 8, 64), draw(90, 2, 64)
    sparse_attention_gqa(q, k, k, selection(10, 90, 40), 0.1, block=4, key_end_T=torch.arange(40, device="cuda").int())


def decode() -> None:
    cache = draw(7, 64, 576)
    packed = pack_latent(cache)
    for tokens, heads in ((3, 128), (100, 128), (70, 64), (5, 16), (3, 24)):
        rows = selection(tokens, 7 * 64, 331)
        sparse_decode(draw(tokens, heads, 576), packed, rows, 0.04, 512, draw(heads))
        sparse_decode(draw(tokens, heads, 576), cache, rows, 0.04, 512, draw(heads))
    k = draw(7, 64, 2, 64)
    sparse_decode_gqa(draw(5, 8, 64), k, k, selection(5, 7 * 64, 331), 0.1)


def indexer() -> None:
    for dtype in (torch.bfloat16, FP8):
        scale = lambda *shape: torch.rand(*shape, device="cuda") if dtype == FP8 else None  # noqa: B023, E731
        tokens, keys = 7, 20001
        q, k, weight = draw(tokens, 64, 128, dtype=dtype), draw(keys, 128, dtype=dtype), draw(tokens, 64).float()
        start = torch.tensor([0, 0, 0, 5, 5, 5, 5], device="cuda")
        end = torch.arange(keys - tokens, keys, device="cuda") + 1
        indexer_scores(q, k, weight, start, end, scale(tokens, 64), scale(keys))
        indexer_topk(q, k, weight, start, end, 300, scale(tokens, 64), scale(keys))
        tokens, keys = 1061, 8201
        q, k, weight = draw(tokens, 64, 128, dtype=dtype), draw(keys, 128, dtype=dtype), draw(tokens, 64).float()
        start = torch.arange(tokens, device="cuda") * 3
        end = torch.arange(keys - tokens, keys, device="cuda") + 1
        k[::2] = k[0]  # ties: some of the guesses fail
        indexer_scores(q, k, weight, start, end, scale(tokens, 64), scale(keys))
        indexer_topk(q, k, weight, start, end, 300, scale(tokens, 64), scale(keys))
        pages, sequence = torch.arange(157, device="cuda"), torch.tensor([0, 0, 1], device="cuda")
        table = torch.stack([pages, pages.flip(0)]).int()
        paged = draw(157, 64, 128, dtype=dtype)
        ends = torch.tensor([10048, 10047, 77], device="cuda")
        paged_indexer_topk(q[:3], paged, weight[:3], table, sequence, ends, 300, scale(3, 64), scale(157, 64))
        few = torch.arange(41, device="cuda")  # enough tokens for the kernel with lists; one of them sees no key
        ends = (few * 251).clamp(max=10048)
        paged_indexer_topk(q[:41], paged, weight[:41], table, few % 2, ends, 300, scale(41, 64), scale(157, 64))


def rest() -> None:
    for positions, k in ((1, 1), (5001, 7), (40001, 2048), (9000, 4096)):
        topk(draw(3, positions, dtype=torch.float32).relu(), k)
    topk(draw(2, 4099), 100)
    x, angle = draw(33, 5, 128), draw(33, 32, dtype=torch.float32)
    norm = dict(norm_weight_D=draw(128), norm_bias_D=draw(128))
    prepare(x, angle.cos(), angle.sin(), fp8=True)
    prepare(x, angle.cos(), angle.sin(), interleaved=True, rope_first=False, **norm)
    cache, target = draw(3, 64, 128).to(FP8), torch.randperm(3 * 64, device="cuda")[:33]
    scales = torch.rand(3, 64, device="cuda")
    prepare_into_cache(x[:, 0].contiguous(), angle.cos(), angle.sin(), cache, scales, target, **norm)


if __name__ == "__main__":
    for part in (attention, decode, indexer, rest):
        part()
        torch.cuda.synchronize()
        print(part.__name__, "done", flush=True)
