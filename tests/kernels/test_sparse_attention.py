import math

import pytest
import torch

from kernels.attention_target import attention_target
from kernels.sparse_attention import reference, sparse_attention, sparse_attention_gqa


def selection(tokens: int, keys: int, keep: int, seed: int = 0) -> torch.Tensor:
    """Rows of every length from 0 (row 0) to `keep`, ascending, -1 tail."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.full((tokens, keep), -1, dtype=torch.int32)
    for t in range(1, tokens):
        count = min(keep, 1 + (t * 7) % keep, keys)
        indices[t, :count] = torch.randperm(keys, generator=generator)[:count].sort().values.int()
    return indices


def oracle(q, k, v, indices, scale, sink=None):
    """One token and one head at a time, float64. k, v: [S, G, .]"""
    tokens, heads, _ = q.shape
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros(tokens, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((tokens, heads), -math.inf, dtype=torch.float64)
    target = torch.zeros(indices.shape, dtype=torch.float64)
    for t in range(tokens):
        rows = indices[t][indices[t] >= 0].long()
        for h in range(heads if len(rows) else 0):
            g = h * k.shape[1] // heads
            scores = (k[rows, g] @ q[t, h]) * scale
            weights = (scores - scores.max()).exp()
            lse[t, h] = weights.sum().log() + scores.max()
            target[t, : len(rows)] += weights / weights.sum() / heads
            total = lse[t, h].exp() + (0 if sink is None else sink[h].double().exp())
            out[t, h] = (scores.exp() / total) @ v[rows, g]
    return out, lse, target


def inputs(tokens=9, keys=23, heads=4, groups=2, dim=12, value_dim=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(tokens, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    k = torch.randn(keys, groups, dim, generator=generator, dtype=torch.float64).to(dtype)
    v = torch.randn(keys, groups, value_dim, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, v, torch.randn(heads, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("chunk", [64, 1 << 24])
def test_mqa_equals_oracle(monkeypatch, chunk, with_sink):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
    q, k, _, sink = inputs(groups=1)
    sink = sink if with_sink else None
    indices = selection(9, 23, 6)
    out, lse = sparse_attention(q, k[:, 0], indices, 0.3, 8, sink_H=sink)
    expected_out, expected_lse, expected_target = oracle(q, k, k[..., :8], indices, 0.3, sink)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(attention_target(q, k[:, 0], indices, 0.3), expected_target)


def test_gqa_equals_oracle(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 500)
    q, k, v, sink = inputs()
    indices = selection(9, 23, 6)
    out, lse = sparse_attention_gqa(q, k, v, indices, 0.3, sink_H=sink)
    expected_out, expected_lse, expected_target = oracle(q, k, v, indices, 0.3, sink)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(attention_target(q, k, indices, 0.3), expected_target)


def test_gradients_are_those_of_dense_masked_attention_and_recomputation_changes_nothing(monkeypatch):
    q, k, _, sink = inputs(groups=1)
    kv = k[:, 0]
    indices = selection(9, 23, 6)
    leaves = [x.clone().requires_grad_() for x in (q, kv, sink)]
    mask = torch.zeros(9, 23, dtype=torch.bool)
    for t in range(9):
        mask[t, indices[t][indices[t] >= 0].long()] = True
    scores = torch.einsum("thd,sd->ths", leaves[0], leaves[1]) * 0.3
    logits = torch.cat([scores.masked_fill(~mask[:, None], -1e30), leaves[2].expand(9, 4).unsqueeze(-1)], -1)
    dense = torch.softmax(logits, -1)[..., :-1] @ leaves[1][:, :8]
    weights = torch.randn(dense.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.autograd.grad((dense * weights).sum(), leaves)
    for chunk in (64, 1 << 24):
        monkeypatch.setattr(reference, "CHUNK_ELEMENTS", chunk)
        out, _ = sparse_attention(leaves[0], leaves[1], indices, 0.3, 8, sink_H=leaves[2])
        for got, want in zip(torch.autograd.grad((out * weights).sum(), leaves), expected, strict=True):
            torch.testing.assert_close(got, want)


def test_gqa_gradients(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 500)
    q, k, v, sink = (x.requires_grad_() for x in inputs(tokens=2, keys=4, dim=3, value_dim=2))
    indices = selection(2, 4, 3)
    assert torch.autograd.gradcheck(lambda *x: sparse_attention_gqa(*x[:3], indices, 0.3, x[3])[0], (q, k, v, sink))
    # the lse of row 0 (no keys) is -inf, whose numeric derivative is NaN
    assert torch.autograd.gradcheck(lambda *x: sparse_attention_gqa(*x, v, indices, 0.3)[1][1:], (q, k))


def test_lse_is_differentiable_and_rows_without_keys_give_no_nan():
    q, k, _, _ = inputs(groups=1)
    q.requires_grad_()
    indices = selection(9, 23, 6)
    out, lse = sparse_attention(q, k[:, 0], indices, 0.3, 8)
    assert out[0].abs().max() == 0
    assert torch.isneginf(lse[0]).all()
    (lse[1:].sum() + out.sum()).backward()
    assert torch.isfinite(q.grad).all()
    assert q.grad[0].abs().max() == 0
    assert q.grad[1:].abs().min() > 0


def test_unselected_rows_may_hold_nan():
    q, k, _, _ = inputs(groups=1)
    indices = selection(9, 20, 6)
    indices[indices >= 0] += 2
    clean, _ = sparse_attention(q, k[:, 0], indices, 0.3, 8)
    k[:2] = float("nan")
    dirty, _ = sparse_attention(q, k[:, 0], indices, 0.3, 8)
    torch.testing.assert_close(dirty[1:], clean[1:], rtol=0, atol=0)
    assert dirty[0].abs().max() == 0


def test_saved_memory_does_not_grow_with_k(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1 << 12)
    saved = {}

    def count(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, k, _, _ = inputs(tokens=64, keys=256, groups=1)
    indices = selection(64, 256, 128)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        out, _ = sparse_attention(q.requires_grad_(), k.requires_grad_()[:, 0], indices, 0.3, 8)
    gathered = indices.numel() * q.shape[-1] * 8
    assert sum(saved.values()) < gathered / 4
    out.sum().backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kv_SD": torch.zeros(23, 11, dtype=torch.float64)}, "kv_SD: shape"),
        ({"indices_TK": torch.zeros(9, 6)}, "indices_TK: dtype"),
        ({"indices_TK": torch.full((9, 6), 23, dtype=torch.int32)}, "indices_TK: values 23..23"),
        ({"indices_TK": torch.full((9, 6), -2, dtype=torch.int32)}, "indices_TK: values -2..-2"),
        ({"value_dim": 13}, "value_dim: 13"),
        ({"scale": float("nan")}, "scale: nan"),
        ({"q_THD": torch.zeros(9, 4, 12)}, "one dtype"),
        ({"sink_H": torch.zeros(3)}, "sink_H: shape"),
    ],
)
def test_bad_input(change, message):
    q, k, _, _ = inputs(groups=1)
    arguments = dict(q_THD=q, kv_SD=k[:, 0], indices_TK=selection(9, 23, 6), scale=0.3, value_dim=8)
    with pytest.raises(ValueError, match=message):
        sparse_attention(**(arguments | change))
