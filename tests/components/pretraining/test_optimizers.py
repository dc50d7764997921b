"""Muon against the singular value decomposition and PyTorch's own; who trains what in which phase."""

import pytest
import torch

from components.pretraining.config import PretrainingConfig
from components.pretraining.muon import Muon, orthogonalise
from components.pretraining.optimizers import optimizers_of
from components.runtime.ranks import Ranks
from model import ModelConfig, Transformer


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 9), (2, 40, 12)])
def test_singular_vectors_are_kept_and_singular_values_come_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonalise(matrices) @ vh.mT  # diagonal in the basis of the input
    values = torch.diagonal(found, dim1=-2, dim2=-1)
    assert torch.allclose(found, torch.diag_embed(values), atol=1e-9)
    assert values.min() > 0.3
    assert values.max() < 1.3


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_steps_agree_with_the_optimiser_of_pytorch(shape):
    """It iterates in bfloat16, ours in fp32: directions agree, sizes within its rounding."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    mine = Muon([ours], lr=0.1, momentum=0.9, weight_decay=0.05)
    reference = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    moved, expected = (ours - start).detach(), (theirs - start).detach()
    assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.999
    assert float(moved.norm() / expected.norm()) == pytest.approx(1, abs=0.02)


def test_a_stack_of_matrices_is_as_many_matrices():
    generator = torch.Generator().manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 8, 6, generator=generator))
    single = [torch.nn.Parameter(part.clone()) for part in stack.detach()]
    stack.grad = torch.randn(3, 8, 6, generator=generator)
    for parameter, gradient in zip(single, stack.grad, strict=True):
        parameter.grad = gradient.clone()
    Muon([stack], lr=0.1).step()
    Muon(single, lr=0.1).step()
    assert torch.allclose(stack, torch.stack(list(single)), atol=1e-6)


def test_ranks_share_the_matrices_and_step_alike():
    """Two ranks, one after the other: each is given what the other one left to it, as their sum would."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 8, 6), (8, 6), (5, 7), (7, 5)]
    starts, gradients = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))

    class Rank(Ranks):
        def sum(self, tensors):
            shared.append([tensor.clone() for tensor in tensors])
            if len(shared) == 3:  # the first rank again, now that the second one's share is known
                for tensor, other in zip(tensors, shared[1], strict=True):
                    tensor += other

    def stepped(ranks):
        parameters = [torch.nn.Parameter(start.clone()) for start in starts]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        Muon(parameters, lr=0.1, weight_decay=0.05, ranks=ranks).step()
        return parameters

    shared: list[list[torch.Tensor]] = []
    stepped(Rank(0, 2)), stepped(Rank(1, 2))
    for first, second in zip(*shared, strict=True):  # every matrix is one rank's
        assert [bool(a.any()) + bool(b.any()) for a, b in zip(first, second, strict=True)] == [1] * len(first)
    for one, alone in zip(stepped(Rank(0, 2)), stepped(None), strict=True):
        torch.testing.assert_close(one, alone)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"stacks of them, got a shape of \(4,\)"):
        Muon([torch.nn.Parameter(torch.zeros(4))], lr=0.1)


@pytest.mark.parametrize("phase", ["dense", "warmup", "sparse"])
def test_every_trained_parameter_has_one_optimiser(phase):
    model = Transformer(ModelConfig.preset("micro")).initialise(0)
    config = PretrainingConfig()
    optimizers = optimizers_of(phase, getattr(config, phase), config, model)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    expected = {
        "dense": model.network_parameters(),
        "warmup": model.indexer_parameters(),
        "sparse": list(model.parameters()),
    }[phase]
    assert set(held) == {id(p) for p in expected} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(group["peak"] > 0 for optimizer in optimizers for group in optimizer.param_groups)
