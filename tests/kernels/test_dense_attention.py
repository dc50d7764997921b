import pytest
import torch

from kernels.dense_attention import cpu, dense_attention, dense_attention_gqa, reference
from kernels.packing import plan_tiles


def packed(lengths: list[int], device: str = "cpu"):
    start = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
    return start.int(), (torch.arange(sum(lengths)) + 1).int()


def oracle(q, k, v, start, end, scale):
    out = torch.zeros(*q.shape[:2], v.shape[-1], dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for t in range(q.shape[0]):
        for h in range(q.shape[1] if end[t] > start[t] else 0):
            g = h * k.shape[1] // q.shape[1]
            scores = (k[start[t] : end[t], g] @ q[t, h]) * scale
            lse[t, h] = torch.logsumexp(scores, 0)
            out[t, h] = (scores - lse[t, h]).exp() @ v[start[t] : end[t], g]
    return out, lse


def assert_equals_oracle_with_gradients(start, end, shapes):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes)
    out, lse = dense_attention_gqa(q, k, v, start, end, 0.4)
    expected_out, expected_lse = oracle(q, k, v, start, end, 0.4)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    got = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for a, b in zip(got, torch.autograd.grad((expected_out * weights).sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("budget", [50, 700, 1 << 24])
def test_equals_oracle_with_gradients(monkeypatch, budget):
    monkeypatch.setattr(reference, "TILE_ELEMENTS", budget)
    start, end = packed([1, 17, 2, 5, 16, 3])
    end[3] = start[3]  # a row without keys inside a sequence
    assert_equals_oracle_with_gradients(start, end, [(44, 4, 6), (44, 2, 6), (44, 2, 5)])


@pytest.mark.parametrize("groups, value_dim", [(1, 5), (2, 6), (4, 9)])
def test_whole_causal_sequences_equal_oracle_with_gradients(groups, value_dim):
    start, end = packed([1, 17, 2, 70, 16, 3])
    assert cpu.causal_lengths(start, end, 109) == [1, 17, 2, 70, 16, 3]
    assert_equals_oracle_with_gradients(start, end, [(109, 4, 6), (109, groups, 6), (109, groups, value_dim)])


def test_a_sequence_does_not_depend_on_what_is_packed_beside_it():
    generator = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(90, *s, generator=generator) for s in ((3, 8), (8,)))
    together = dense_attention(q, kv, *packed([50, 40]), 0.5, 6)
    alone = dense_attention(q[50:], kv[50:], *packed([40]), 0.5, 6)
    assert all(torch.equal(a[50:], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(
    "start, end, rows",
    [
        ([0, 0, 0], [1, 2, 2], 3),  # the last query does not see itself
        ([0, 0, 0], [2, 3, 4], 4),  # the first query comes late
        ([0, 0, 2], [1, 2, 2], 3),  # a query without keys
        ([1, 1, 3], [2, 3, 4], 4),  # keys of other rows
        ([0, 0, 1], [1, 2, 3], 3),  # the last query sees another sequence
    ],
)
def test_other_ranges_are_not_taken_for_causal_sequences(start, end, rows):
    assert cpu.causal_lengths(torch.tensor(start), torch.tensor(end), rows) is None


def test_mqa_values_are_the_first_columns():
    start, end = packed([4, 9])
    generator = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(13, *s, generator=generator, dtype=torch.float64) for s in ((3, 8), (8,)))
    out, lse = dense_attention(q, kv, start, end, 0.5, 6)
    expected_out, expected_lse = oracle(q, kv[:, None], kv[:, None, :6], start, end, 0.5)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("budget", [1, 40, 1 << 20])
def test_tiles_hold_every_row_once_and_exactly_its_keys(budget):
    start, end = packed([5, 1, 30, 31, 2, 64])
    pairs = set()
    rows = []
    for tile in plan_tiles(start, end, 2, budget):
        rows += tile.rows_NQ[tile.real_NQ].tolist()
        for n, q, l in tile.valid_NQL.nonzero().tolist():
            pair = (int(tile.rows_NQ[n, q]), int(tile.keys_NL[n, l]))
            assert pair not in pairs
            pairs.add(pair)
    assert sorted(rows) == list(range(len(start)))
    assert pairs == {(t, s) for t in range(len(start)) for s in range(int(start[t]), int(end[t]))}


def test_many_short_sequences_are_few_tiles():
    start, end = packed([90 + i % 20 for i in range(64)])
    assert len(plan_tiles(start, end, 4, 1 << 24)) <= 4


def test_bad_ranges():
    q, kv = torch.zeros(3, 2, 4), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"0\.\.3 is accepted"):
        dense_attention(q, kv, torch.zeros(3).int(), torch.tensor([1, 2, 4]).int(), 1.0, 4)
    with pytest.raises(ValueError, match="key_end_T: shape"):
        dense_attention(q, kv, torch.zeros(3).int(), torch.zeros(2).int(), 1.0, 4)
