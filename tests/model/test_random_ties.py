"""Random tie-breaks: the deterministic selection where no scores tie, any of the tied keys where they do."""

import torch

from kernels.paged_indexer_topk import paged_indexer_topk
from model.random_ties import random_tie_positions


def example(integers: bool):
    generator = torch.Generator().manual_seed(0)
    q, cache, weight = (torch.randn(shape, generator=generator) for shape in ((6, 2, 4), (7, 4, 4), (6, 2)))
    if integers:  # few values: many ties
        q, cache, weight = q.sign(), cache.sign(), weight.sign()
    pages = torch.tensor([[5, 2, 0], [1, 6, 3]], dtype=torch.int32)
    return q, cache, weight, pages, torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([3, 9, 12, 1, 7, 11])


def test_without_ties_the_selection_is_the_deterministic_one():
    # ReLU makes scores of 0, which tie: keys that all queries like have none
    q, cache, weight, *rest = example(integers=False)
    lifted = (q.abs(), cache.abs(), weight.abs(), *rest)
    _, want, _ = paged_indexer_topk(*lifted, 4)
    got = random_tie_positions(*lifted, 4, torch.Generator().manual_seed(1))
    assert torch.equal(got.int(), want)


def test_ties_go_to_any_of_the_tied_keys_and_scores_stay_the_best():
    q, cache, weight, pages, sequence, end = example(integers=True)
    seen = set()
    for seed in range(20):
        got = random_tie_positions(q, cache, weight, pages, sequence, end, 4, torch.Generator().manual_seed(seed))
        for token in range(6):
            keys = cache[pages[sequence[token]].long()].flatten(0, 1)[: end[token]]
            score = (torch.relu(keys @ q[token].T) * weight[token]).sum(-1)
            chosen = got[token][got[token] >= 0].long()
            assert chosen.tolist() == sorted(set(chosen.tolist()))
            best = score.sort(descending=True).values[:4]
            assert torch.equal(score[chosen].sort(descending=True).values, best)
        seen.add(tuple(got.flatten().tolist()))
    assert len(seen) > 10
