import pytest
import torch

from kernels.attention_target import attention_target
from kernels.dense_attention import reference as dense_reference
from kernels.indexer_loss import indexer_loss_dense, indexer_loss_sparse, reference
from kernels.sparse_attention import reference as sparse_reference


def kl_oracle(p, scores):
    """One row; the textbook formula."""
    q = torch.softmax(scores, 0)
    return (p * (p / q).log()).sum()


def inputs(tokens=13, keys=13):
    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, 3, 8), (keys, 8), (tokens, 3), (tokens, 4, 6), (keys, 6)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def score_rows(index_q, index_k, weight, t, rows):
    return (weight[t][:, None] * (index_q[t] @ index_k[rows].T).relu()).sum(0)


@pytest.mark.parametrize("budget", [40, 1 << 24])
def test_sparse_equals_oracle_with_gradients(monkeypatch, budget):
    monkeypatch.setattr(sparse_reference, "CHUNK_ELEMENTS", budget)
    index_q, index_k, weight, q, kv = inputs()
    indices = torch.full((13, 5), -1, dtype=torch.int32)
    for t in range(1, 13):
        count = min(5, t)
        indices[t, :count] = torch.arange(t)[-count:].int()
    target = attention_target(q, kv, indices, 0.3)
    loss, rows = indexer_loss_sparse(index_q, index_k, weight, indices, target * 4)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(1, 13):
        valid = indices[t][indices[t] >= 0].long()
        p = torch.softmax(0.3 * q[t].detach() @ kv[valid].detach().T, -1).mean(0)
        expected = expected + kl_oracle(p, score_rows(index_q, index_k, weight, t, valid))
    torch.testing.assert_close(loss, expected)
    assert int(rows) == 12
    leaves = (index_q, index_k, weight)
    for a, b in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("budget", [60, 1 << 24])
def test_dense_equals_oracle_and_reaches_only_the_indexer(monkeypatch, budget):
    monkeypatch.setattr(reference, "TILE_ELEMENTS", budget)
    assert dense_reference.TILE_ELEMENTS > 60
    index_q, index_k, weight, q, kv = inputs()
    start = torch.tensor([0] * 5 + [5] * 8)
    end = torch.arange(13) + 1
    loss, rows = indexer_loss_dense(index_q, index_k, weight, q, kv, start, end, 0.3)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(13):
        keys = torch.arange(int(start[t]), t + 1)
        p = torch.softmax(0.3 * q[t].detach() @ kv[keys].detach().T, -1).mean(0)
        expected = expected + kl_oracle(p, score_rows(index_q, index_k, weight, t, keys))
    torch.testing.assert_close(loss, expected)
    assert int(rows) == 13
    leaves = (index_q, index_k, weight)
    for a, b in zip(
        torch.autograd.grad(loss, leaves, retain_graph=True), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(a, b)
    loss.backward()
    assert q.grad is None
    assert kv.grad is None


def test_no_rows_is_zero_and_differentiable():
    index_q, index_k, weight, _, _ = inputs(tokens=2)
    indices = torch.full((2, 3), -1, dtype=torch.int32)
    loss, rows = indexer_loss_sparse(index_q, index_k, weight, indices, torch.zeros(2, 3, dtype=torch.float64))
    loss.backward()
    assert loss == 0
    assert rows == 0
    assert torch.isfinite(index_q.grad).all()


def test_bad_input():
    index_q, index_k, weight, _, _ = inputs()
    with pytest.raises(ValueError, match="weight_TH: shape"):
        indexer_loss_sparse(index_q, index_k, weight[:, :2], torch.zeros(13, 2).int(), torch.zeros(13, 2))
    with pytest.raises(ValueError, match="target_TK: shape"):
        indexer_loss_sparse(index_q, index_k, weight, torch.zeros(13, 2).int(), torch.zeros(13, 3))
