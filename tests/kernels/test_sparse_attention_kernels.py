"""The Triton kernels against float64: in the interpreter without a GPU, on the card with one. Hopper's Gluon kernel:
gpu."""

import pytest
import torch

from kernels.sparse_attention import reference, sparse_attention, sparse_attention_gqa
from kernels.sparse_attention import triton as kernels
from tests.kernels.ahead_of_time import compile_all
from tests.kernels.test_sparse_attention import oracle, selection

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates to bf16 instead of rounding
BARS = {torch.float32: 1e-5, torch.bfloat16: 5e-3 if DEVICE == "cuda" else 8e-3}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double().cpu() - want).norm() / want.norm())


def draw(*shape: int, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads, dim, value_dim, keep", [(16, 576, 512, 70), (5, 80, 64, 33), (64, 64, 64, 5), (3, 24, 24, 70)]
)
def test_mqa_equals_float64(heads, dim, value_dim, keep, dtype):
    q, kv, sink = draw(3, heads, dim, dtype=dtype), draw(150, dim, dtype=dtype), draw(heads)
    indices = selection(3, 150, keep)
    out, lse = kernels.sparse_attention(
        *(x.to(DEVICE) for x in (q, kv[:, None])), None, indices.to(DEVICE), dim**-0.5, value_dim, sink.to(DEVICE)
    )
    want_out, want_lse, _ = oracle(q, kv[:, None], kv[:, None, :value_dim], indices, dim**-0.5, sink)
    assert relative(out, want_out) < BARS[dtype]
    assert relative(lse[1:], want_lse[1:]) < 1e-5
    assert out[0].abs().max() == 0
    assert torch.isneginf(lse[0]).all()


@pytest.mark.parametrize("block", [1, 4])
def test_gqa_with_blocks_of_queries(block):
    q, k, v = draw(6, 8, 64), draw(90, 2, 64), draw(90, 2, 32)
    indices = selection(-(-6 // block) + 1, 90, 40)[1:]
    key_end = torch.tensor([90, 50, 0, 90, 33, 70], dtype=torch.int32)
    out, lse = kernels.sparse_attention(
        *(x.to(DEVICE) for x in (q, k, v, indices)), 0.2, 32, None, block, key_end.to(DEVICE)
    )
    want_out, want_lse, _ = oracle(q, k, v, reference.per_token(indices, block, 6, key_end), 0.2)
    seen = torch.isfinite(want_lse)
    assert relative(out, want_out) < 1e-5
    assert relative(lse.cpu()[seen], want_lse[seen]) < 1e-5
    assert torch.isneginf(lse.cpu()[~seen]).all()


def test_index_out_of_range_gives_nan_and_reads_nothing():
    q, kv = draw(2, 16, 32), draw(20, 32)
    indices = torch.tensor([[0, 3, 1 << 30], [1, 2, -1]], dtype=torch.int32)
    out, lse = kernels.sparse_attention(*(x.to(DEVICE) for x in (q, kv[:, None])), None, indices.to(DEVICE), 0.2, 32)
    assert torch.isnan(out[0]).all()
    assert torch.isnan(lse[0]).all()
    assert torch.isfinite(out[1]).all()


def guarded(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor between two stretches of NaN, in one allocation."""
    whole = torch.full((tensor.numel() + 2048,), float("nan"), dtype=tensor.dtype, device=DEVICE)
    whole[1024:-1024] = tensor.to(DEVICE).flatten()
    return whole, whole[1024:-1024].view(tensor.shape)


def test_nothing_outside_the_inputs_is_read_and_poisoned_rows_stay_out():
    q, kv = draw(3, 20, 40), draw(50, 40)
    indices = selection(3, 40, 19)
    indices[indices >= 0] += 7
    want, _, _ = oracle(q, kv[:, None], kv[:, None, :33], indices, 0.2)
    unused = torch.ones(50, dtype=torch.bool)
    unused[indices[indices >= 0].long()] = False
    kv[unused] = float("nan")
    out, _ = kernels.sparse_attention(guarded(q)[1], guarded(kv)[1][:, None], None, indices.to(DEVICE), 0.2, 33)
    assert relative(out, want) < 1e-5


def request(capability: int, heads: int, dim: int, value_dim: int, groups: int = 1, dtype=torch.bfloat16) -> dict:
    compiled = kernels.constants(
        heads, groups, 2048, dim, value_dim, groups == 1, 1, False, False, dtype, divmod(capability, 10)
    )
    options = {name: compiled.pop(name) for name in ("num_warps", "num_stages")}
    compiled |= dict(SPLITS=1, UPCAST=False, key_end_ptr=None, sink_ptr=None)
    element = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
    arguments = dict(q_ptr=element, k_ptr=element, v_ptr=element, indices_ptr="*i32", out_ptr=element, lse_ptr="*fp32")
    arguments |= {f"{x}_stride_{y}": "i32" for x, y in ("qt", "qh", "ks", "kg", "vs", "vg")}
    arguments |= dict(indices_stride="i32", tokens="i32", key_rows="i32", scale_log2="fp32")
    return dict(
        function="kernels.sparse_attention.triton:sparse_attention_kernel",
        arguments=arguments,
        constants=compiled,
        options=options,
        capability=capability,
    )


@pytest.mark.slow
def test_compiles_within_the_shared_memory_of_each_architecture():
    limits = {80: 166912, 89: 101376, 90: 232448}
    shapes = [(128, 576, 512, 1, torch.bfloat16), (16, 576, 512, 1, torch.float32), (32, 128, 128, 8, torch.bfloat16)]
    requests = [request(c, h, d, v, g, dtype) for c in limits for h, d, v, g, dtype in shapes]
    for asked, got in zip(requests, compile_all(requests), strict=True):
        assert got["shared"] <= limits[asked["capability"]], (asked, got)


def hopper_request(heads: int, rope: bool) -> dict:
    arguments = dict(
        q_ptr="*bf16", kv_ptr="*bf16", indices_ptr="*i32", span_ptr="*i32", out_ptr="*bf16", lse_ptr="*fp32"
    )
    integers = (
        "tiles",
        "tokens",
        "together",
        "key_rows",
        "q_stride_t",
        "q_stride_h",
        "kv_stride",
        "indices_stride",
        "nought",
    )
    arguments |= {name: "i32" for name in integers} | {"scale_log2": "fp32"}
    constants = dict(KEYS=2048, HEADS=heads, HAS_REST=rope, HAS_SINK=False, sink_ptr=None)
    module, name = "gluon_few_heads", "sparse_attention_few_heads_kernel"
    if heads >= 64:
        module, name = "gluon", "sparse_attention_hopper_kernel"
        constants["ROW_BLOCKS"] = heads // 64
    else:
        constants["PART"] = 16
    return dict(
        function=f"kernels.sparse_attention.{module}:{name}",
        arguments=arguments,
        constants=constants,
        options=dict(num_warps=4),
        capability=90,
    )


@pytest.mark.slow
def test_hopper_kernels_compile_without_spills():
    # products of 16 columns of the operands: scores (512 or 576) by both warpgroups, then their shares of P V in two
    # quarters of the columns; with few heads the scores by both groups for both tokens, and V' P' for both
    expected = {(128, True): 104, (128, False): 96, (16, True): 208, (16, False): 192}
    for case, got in zip(expected, compile_all([hopper_request(*case) for case in expected]), strict=True):
        assert got["shared"] <= 232448
        assert got["stack"] == 0, case
        assert got["instructions"]["wgmma.mma_async"] == expected[case], case
        assert got["instructions"]["setmaxnreg"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("heads, dim", [(128, 576), (64, 576), (64, 512), (16, 576), (7, 576), (16, 512), (40, 576)])
def test_latent_attention_on_the_card(heads, dim):
    """Every row length from 0 to beyond 2048, poisoned unused rows, a sink; 20 repeats bitwise equal."""
    tokens, keys = 300, 4100
    q, kv, sink = draw(tokens, heads, dim, dtype=torch.bfloat16), draw(keys, dim, dtype=torch.bfloat16), draw(heads)
    indices = selection(tokens, keys - 1, 2048)
    indices[indices >= 0] += 1
    indices[7, 3] = -1  # a hole
    indices[8] = torch.arange(1, 2049)
    clean = kv.cuda().double()
    kv[0] = float("nan")
    inputs = [x.cuda() for x in (q, kv, indices)]
    out, lse = sparse_attention(*inputs, dim**-0.5, 512, sink.cuda())
    want_out, want_lse = reference.sparse_attention(inputs[0].double(), clean, inputs[2], dim**-0.5, 512, sink.cuda())
    assert relative(out, want_out.cpu()) < 5e-3
    assert relative(lse[1:], want_lse[1:].cpu()) < 1e-5
    assert out[0].abs().max() == 0
    for t in (1, 7, 8, 150, 299):
        assert relative(out[t], want_out[t].cpu()) < 5e-3
    for _ in range(20):
        again, lse_again = sparse_attention(*inputs, dim**-0.5, 512, sink.cuda())
        assert torch.equal(out, again)
        assert torch.equal(lse, lse_again)
    inputs[2][5, 0] = keys
    broken, _ = sparse_attention(*inputs, dim**-0.5, 512)
    assert torch.isnan(broken[5]).all()
    assert torch.isfinite(broken[6]).all()
    with pytest.raises(ValueError, match="indices_TK: values"):
        sparse_attention(*inputs, dim**-0.5, 512, check_indices=True)


@pytest.mark.gpu
def test_gradients_on_the_card_and_under_compile():
    q, k, v = (draw(40, n, 64).cuda().requires_grad_() for n in (8, 2, 2))
    indices = selection(40, 40, 16).cuda()
    run = torch.compile(lambda q, k, v: sparse_attention_gqa(q, k, v, indices, 0.1)[0], fullgraph=True)
    got = torch.autograd.grad(run(q, k, v).square().sum(), (q, k, v))
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, _ = reference.sparse_attention_gqa(*doubles, indices, 0.1)
    for a, b in zip(got, torch.autograd.grad(out.square().sum(), doubles), strict=True):
        assert relative(a, b.cpu()) < 1e-4


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    tokens, heads = 30000, 128
    q = torch.randn(tokens, heads, 576, dtype=torch.bfloat16, device="cuda")
    kv = torch.randn(4096, 576, dtype=torch.bfloat16, device="cuda")
    indices = torch.randint(0, 4096, (tokens, 64), device="cuda").sort(1).values.int()
    assert q.numel() > 2**31
    for run in (
        lambda: sparse_attention(q, kv, indices, 0.04, 512),
        lambda: kernels.sparse_attention(q, kv[:, None], None, indices, 0.04, 512),
    ):
        out, _ = run()
        want, _ = reference.sparse_attention(q[-50:].double(), kv.double(), indices[-50:], 0.04, 512)
        assert relative(out[-50:], want.cpu()) < 5e-3
