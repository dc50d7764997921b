"""Data-parallel training against one process, and what happens when a rank dies."""

import os
import signal
from pathlib import Path

import pytest
import torch

from components.pretraining.data import Example, Totals
from components.pretraining.phases import batch_loss
from components.runtime.ranks import open_ranks
from model import ModelConfig, Transformer

pytestmark = pytest.mark.slow

LENGTHS = (9, 4, 12, 7, 5)


def model():
    return Transformer(ModelConfig.preset("micro", vocab_size=40)).initialise(0)


def examples():
    generator = torch.Generator().manual_seed(0)
    return [
        Example(
            torch.randint(40, (length,), generator=generator),
            torch.tensor([0.1, 1.0, 0.0])[torch.randint(3, (length,), generator=generator)],
        )
        for length in LENGTHS
    ]


def gradients(ranks, mode, indexer_loss):
    """Gradients of this rank's share, summed over the ranks, and the values that curves show."""
    network, whole = model(), examples()
    network.attention_mode = mode
    loss, parts, _ = batch_loss(network, ranks.share(whole), Totals.of(whole), indexer_loss, train_network=True)
    loss.backward()
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in network.parameters()]
    ranks.sum([*found, *parts.values()])
    return found, {name: float(value) for name, value in parts.items()}


def follow(ranks, mode, indexer_loss):
    gradients(ranks, mode, indexer_loss)


@pytest.mark.parametrize("mode,indexer_loss", [("dense", "none"), ("sparse", "sparse")])
@pytest.mark.parametrize("size", [2, 3])
def test_the_ranks_gradients_add_up_to_those_of_one_process(tmp_path, size, mode, indexer_loss):
    with open_ranks(1, tmp_path, follow) as alone:
        expected, values = gradients(alone, mode, indexer_loss)
    with open_ranks(size, tmp_path, follow, mode, indexer_loss) as ranks:
        got, same_values = gradients(ranks, mode, indexer_loss)
    assert not list(tmp_path.iterdir())
    assert same_values == pytest.approx(values, rel=1e-5)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_rank_without_an_example_takes_part(tmp_path):
    with open_ranks(3, tmp_path, lone_follow) as ranks:
        (total,) = lone(ranks)
    assert total == pytest.approx(lone_loss())


def lone_loss():
    one = examples()[:1]
    return float(batch_loss(model(), one, Totals.of(one), "none", train_network=True)[0])


def lone(ranks):
    one = examples()[:1]
    loss, _, _ = batch_loss(model(), ranks.share(one), Totals.of(one), "none", train_network=True)
    loss = loss.detach().clone()
    ranks.sum([loss])
    return [float(loss)]


def lone_follow(ranks):
    lone(ranks)


def dies(ranks):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_is_killed_ends_the_training_with_its_name(tmp_path):
    def work():
        with open_ranks(2, tmp_path, dies) as ranks:
            while True:
                ranks.sum([torch.zeros(3)])

    with pytest.raises(RuntimeError, match=r"ended too early: rank 1 \(exit code -9\).*run the command again"):
        work()


def test_what_rank_0_gives_is_what_all_get(tmp_path):
    with open_ranks(2, tmp_path, receives, tmp_path / "got") as ranks:
        assert ranks.from_first({"step": 3}) == {"step": 3}
    assert (tmp_path / "got").read_text() == "{'step': 3}"


def receives(ranks, path: Path):
    path.write_text(str(ranks.from_first(None)))
