import pytest
import torch

from kernels.sparse_decode import ROW_BYTES, pack_latent, sparse_decode, sparse_decode_gqa, unpack_latent
from kernels.sparse_decode import triton as kernels
from tests.kernels.ahead_of_time import compile_all
from tests.kernels.test_sparse_attention import oracle, selection
from tests.kernels.test_sparse_attention_kernels import DEVICE, draw, relative


def test_packed_rows_keep_their_layout_and_precision():
    kv = draw(3, 5, 576) * 10
    packed = pack_latent(kv)
    assert packed.shape == (3, 5, ROW_BYTES)
    unpacked = unpack_latent(packed, torch.float32)
    assert relative(unpacked[..., :512], kv[..., :512].double()) < 3e-2
    assert torch.equal(unpacked[..., 512:], kv[..., 512:].bfloat16().float())
    # by the layout's definition, byte for byte, in numpy: bytes 512..527 are four fp32 scales, powers of two
    scales = torch.from_numpy(packed[1, 2, 512:528].numpy().view("float32").copy())
    assert torch.equal(scales, torch.exp2(scales.log2().round()))
    tile = packed[1, 2, 128:256].view(torch.float8_e4m3fn).float() * scales[1]
    assert torch.equal(tile, unpacked[1, 2, 128:256])
    assert float(tile.abs().max() / scales[1]) > 224  # the scale is the smallest that fits
    assert torch.equal(unpack_latent(pack_latent(unpacked), torch.float32), unpacked)


def test_reference_over_pages():
    q, cache = draw(3, 4, 576), pack_latent(draw(4, 64, 576))
    rows = selection(3, 256, 20)
    kv = unpack_latent(cache, torch.float32).flatten(0, 1)
    out, lse = sparse_decode(q, cache, rows, 0.05, 512)
    want_out, want_lse, _ = oracle(q, kv[:, None], kv[:, None, :512], rows, 0.05)
    assert relative(out, want_out) < 1e-5
    assert relative(lse[1:], want_lse[1:]) < 1e-5


@pytest.mark.parametrize("splits", [1, 3])
def test_split_gqa_equals_float64(splits):
    q, k, v, sink = draw(3, 8, 64), draw(150, 2, 64), draw(150, 2, 64), draw(8)
    rows = selection(3, 150, 70)
    inputs = [x.to(DEVICE) for x in (q, k, v, rows)]
    out, lse = kernels.sparse_decode(*inputs, 0.1, 64, sink.to(DEVICE), splits)
    want_out, want_lse, _ = oracle(q, k, v, rows, 0.1, sink)
    assert relative(out, want_out) < 1e-5
    assert relative(lse[1:], want_lse[1:]) < 1e-5
    assert out[0].abs().max() == 0
    reference_out, _ = sparse_decode_gqa(q, k.view(3, 50, 2, 64), v.view(3, 50, 2, 64), rows, 0.1, sink)
    assert relative(reference_out, want_out) < 1e-5


@pytest.mark.parametrize("heads, splits", [(16, 1), (7, 3)])
def test_fp8_rows_equal_float64_of_what_they_hold(heads, splits):
    q, cache, sink = draw(2, heads, 576, dtype=torch.bfloat16), pack_latent(draw(96, 576)), draw(heads)
    rows = selection(2, 96, 70)
    inputs = [x.to(DEVICE) for x in (q, cache, rows)]
    out, lse = kernels.sparse_decode_fp8(*inputs, 0.05, sink.to(DEVICE), splits)
    kv = unpack_latent(cache, torch.float64)
    want_out, want_lse, _ = oracle(q, kv[:, None], kv[:, None, :512], rows, 0.05, sink)
    assert relative(out, want_out) < 8e-3
    assert relative(lse[1:], want_lse[1:]) < 1e-5


def test_row_out_of_range_gives_nan():
    q, k = draw(2, 16, 32), draw(20, 1, 32)
    rows = torch.tensor([[0, 3, 20] + [1] * 200, [1, 2, -1] + [-1] * 200], dtype=torch.int32)
    out, lse = kernels.sparse_decode(*(x.to(DEVICE) for x in (q, k, k, rows)), 0.2, 32, None, 2)
    assert torch.isnan(out[0]).all()
    assert torch.isnan(lse[0]).all()
    assert torch.isfinite(out[1]).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cache_PSD": torch.zeros(2, 4, 655, dtype=torch.uint8)}, "cache_PSD: shape"),
        ({"rows_TK": torch.full((2, 3), 8, dtype=torch.int32)}, "rows_TK: values 8..8"),
        ({"value_dim": 256}, "value_dim 256"),
        ({"splits": 0}, "splits: 0"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(
        q_THD=torch.zeros(2, 4, 576),
        cache_PSD=torch.zeros(2, 4, 656, dtype=torch.uint8),
        rows_TK=torch.zeros(2, 3, dtype=torch.int32),
        scale=1.0,
        value_dim=512,
    )
    with pytest.raises(ValueError, match=message):
        sparse_decode(**(arguments | change))


@pytest.mark.slow
def test_fp8_kernel_compiles_within_shared_memory():
    limits = {89: 101376, 90: 232448}
    requests = []
    for capability in limits:
        for heads in (16, 128):
            constants = kernels.fp8_constants(heads, 2048, (capability // 10, capability % 10))
            options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            arguments = dict(q_ptr="*bf16", cache_ptr="*u8", rows_ptr="*i32", out_ptr="*fp32", lse_ptr="*fp32")
            arguments |= {n: "i32" for n in ("cache_rows", "q_stride_t", "q_stride_h", "rows_stride")}
            requests.append(
                dict(
                    function="kernels.sparse_decode.triton:sparse_decode_fp8_kernel",
                    arguments=arguments | {"scale_log2": "fp32"},
                    constants=constants | dict(SPLITS=4, UPCAST=False),
                    options=options,
                    capability=capability,
                )
            )
    for asked, got in zip(requests, compile_all(requests), strict=True):
        assert got["shared"] <= limits[asked["capability"]], (asked, got)


@pytest.mark.slow
def test_hopper_kernel_compiles():
    arguments = dict(q_ptr="*bf16", word_ptr="*i32", scale_ptr="*fp32", indices_ptr="*i32", span_ptr="*i32")
    arguments |= dict(out_ptr="*bf16", lse_ptr="*fp32", scale_log2="fp32")
    arguments |= {n: "i32" for n in ("tiles", "key_rows", "q_stride_t", "q_stride_h", "indices_stride", "nought")}
    constants = dict(KEYS=2048, HEADS=128, ROW_BLOCKS=2, HAS_SINK=False, sink_ptr=None)
    request = dict(function="kernels.sparse_decode.gluon:sparse_decode_hopper_kernel", arguments=arguments)
    (got,) = compile_all([request | dict(constants=constants, options=dict(num_warps=4), capability=90)])
    assert got["shared"] <= 232448
    assert got["stack"] <= 128  # addresses of the producer; none of the products' operands
    assert got["instructions"]["wgmma.mma_async"] == 104
    assert got["instructions"]["setmaxnreg"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [128, 64, 16, 24])
@pytest.mark.parametrize("tokens", [3, 100])
def test_decode_on_the_card(heads, tokens):
    keys = 6400
    q, kv, sink = draw(tokens, heads, 576, dtype=torch.bfloat16), draw(keys, 576, dtype=torch.bfloat16), draw(heads)
    rows = selection(tokens, keys, 2048)
    packed = pack_latent(kv).view(100, 64, 656).cuda()
    caches = {"fp8": packed, "bf16": kv.view(100, 64, 576).cuda()}
    for name, cache in caches.items():
        held = unpack_latent(cache, torch.float64) if name == "fp8" else cache.double()
        want_out, want_lse = sparse_decode_double(q, held, rows, sink)
        for splits in (None, 1, 5):
            arguments = (q.cuda(), cache, rows.cuda(), 576**-0.5, 512, sink.cuda())
            out, lse = sparse_decode(*arguments, splits=splits)
            assert relative(out, want_out) < 5e-3, (name, splits)
            assert relative(lse[1:], want_lse[1:]) < 1e-5, (name, splits)
            for _ in range(5):
                again, _ = sparse_decode(*arguments, splits=splits)
                assert torch.equal(out, again)


def sparse_decode_double(q, held, rows, sink):
    from kernels.sparse_attention import reference

    device = held.device
    out, lse = reference.sparse_attention(
        q.double().to(device), held.flatten(0, 1), rows.to(device), 576**-0.5, 512, sink.to(device)
    )
    return out.cpu(), lse.cpu()
