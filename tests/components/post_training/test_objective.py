"""GRPO terms against values worked out by hand, finite differences, and exact expectations."""

import itertools
import math

import pytest
import torch

from components.post_training.objective import (
    biased_kl,
    clipped_policy_term,
    group_advantages,
    grpo_loss,
    length_penalised,
    off_policy_sequence_mask,
    rft_loss,
    sequence_mean,
    truncated_importance,
    unbiased_kl,
)

OPTIONS = {"clip_low": 0.2, "clip_high": 0.3, "kl_weight": 0.1, "sequence_mask_threshold": 0.05}


def test_advantage_is_reward_minus_group_mean_without_standard_deviation():
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    assert group_advantages(reward, group).tolist() == [0.75, -0.25, -0.25, -0.25, 0.0, 0.0]


def test_sequence_mean_weighs_sequences_not_tokens():
    value = torch.tensor([3.0, 5.0, 7.0])
    assert sequence_mean(value, torch.tensor([0, 0, 2]), 3).tolist() == [4.0, 0.0, 7.0]


@pytest.mark.parametrize(
    "ratio,advantage,expected",
    [
        (1.5, 2.0, 2.6),  # clipped above: 1.3 * 2
        (1.5, -2.0, -3.0),  # the pessimistic side is not clipped
        (0.5, 2.0, 1.0),
        (0.5, -2.0, -1.6),  # clipped below: 0.8 * -2
        (1.1, 1.0, 1.1),
    ],
)
def test_clip(ratio, advantage, expected):
    got = clipped_policy_term(torch.tensor([ratio]), torch.tensor([advantage]), 0.2, 0.3)
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_kl_by_hand():
    # pi = 0.5, pi_old = 0.25, pi_ref = 0.1: r = 2, pi_ref / pi = 0.2
    got = unbiased_kl(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([0.1]).log())
    assert got.item() == pytest.approx(2 * (0.2 - math.log(0.2) - 1), rel=1e-6)


def test_kl_is_unbiased_off_policy_in_value_and_gradient():
    """Over all tokens of a small vocabulary, weighted by pi_old, it is KL(pi, pi_ref), and so is its gradient."""
    generator = torch.Generator().manual_seed(0)
    logits, old, reference = torch.randn(3, 7, dtype=torch.float64, generator=generator).unbind()
    logits.requires_grad_(True)
    logprob, old_logprob, reference_logprob = (x.log_softmax(-1) for x in (logits, old, reference))
    estimate = (old_logprob.exp() * unbiased_kl(logprob, old_logprob, reference_logprob)).sum()
    exact = (logprob.exp() * (logprob - reference_logprob)).sum()
    assert estimate.item() == pytest.approx(exact.item(), rel=1e-12)
    (got,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    (want,) = torch.autograd.grad(exact, logits)
    assert torch.allclose(got, want, atol=1e-12)


def test_sequence_mask_needs_both_a_negative_advantage_and_drift():
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    new = torch.tensor([-1.2, -1.0, -1.2, -1.0, -1.04, -1.0])  # mean drift 0.1, 0.1, 0.02
    sequence = torch.tensor([0, 0, 1, 1, 2, 2])
    mask = off_policy_sequence_mask(new, old, sequence, torch.tensor([-1.0, 1.0, -1.0]), 0.05)
    assert mask.tolist() == [False, True, True]


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    old = -torch.rand(9, dtype=dtype, generator=generator) - 0.1
    new = old + 0.4 * torch.randn(9, dtype=dtype, generator=generator)
    reference = old + 0.2 * torch.randn(9, dtype=dtype, generator=generator)
    sequence = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    return new, old, reference, sequence, torch.tensor([0.5, -0.75, 0.25], dtype=dtype)


def test_loss_equals_the_printed_equation_term_by_term():
    new, old, reference, sequence, advantage = example()
    total = 0.0
    for i in range(3):
        tokens = (sequence == i).nonzero().flatten().tolist()
        drift = sum(float(old[t] - new[t]) for t in tokens) / len(tokens)
        mask = 0.0 if float(advantage[i]) < 0 and drift > 0.05 else 1.0
        inner = 0.0
        for t in tokens:
            ratio = math.exp(float(new[t] - old[t]))
            a = float(advantage[i])
            policy = min(ratio * a, min(max(ratio, 0.8), 1.3) * a)
            quotient = math.exp(float(reference[t] - new[t]))
            inner += policy * mask - 0.1 * ratio * (quotient - math.log(quotient) - 1)
        total += inner / len(tokens)
    got = grpo_loss(new, old, reference, sequence, advantage, total_sequences=3, **OPTIONS)
    assert got.loss.item() == pytest.approx(-total / 3, rel=1e-9)


def test_gradient_against_finite_differences():
    new, old, reference, sequence, advantage = example()

    def loss(x):
        return grpo_loss(x, old, reference, sequence, advantage, total_sequences=3, **OPTIONS).loss

    assert torch.autograd.gradcheck(loss, (new.clone().requires_grad_(True),), eps=1e-7, atol=1e-6)


def test_micro_batches_add_up():
    new, old, reference, sequence, advantage = example()
    whole = grpo_loss(new, old, reference, sequence, advantage, total_sequences=3, **OPTIONS).loss
    first, rest = sequence < 1, sequence >= 1
    parts = (
        grpo_loss(
            new[first], old[first], reference[first], sequence[first], advantage[:1], total_sequences=3, **OPTIONS
        ).loss
        + grpo_loss(
            new[rest], old[rest], reference[rest], sequence[rest] - 1, advantage[1:], total_sequences=3, **OPTIONS
        ).loss
    )
    assert whole.item() == pytest.approx(parts.item(), rel=1e-12)


def loss_of(example_values, **options):
    new, old, reference, sequence, advantage = example_values
    return grpo_loss(new, old, reference, sequence, advantage, total_sequences=3, **{**OPTIONS, **options})


def test_biased_kl_by_hand_and_its_gradient_is_not_that_of_the_kl():
    # pi_ref / pi = 0.2, whatever pi_old is
    got = biased_kl(torch.tensor([0.5]).log(), torch.tensor([0.1]).log())
    assert got.item() == pytest.approx(0.2 - math.log(0.2) - 1, rel=1e-6)
    generator = torch.Generator().manual_seed(0)
    logits, reference = torch.randn(2, 7, dtype=torch.float64, generator=generator).unbind()
    logits.requires_grad_(True)
    logprob, reference_logprob = logits.log_softmax(-1), reference.log_softmax(-1)
    # on-policy: the expectation of plain K3 over pi is the KL, the expectation of its gradient is not the KL's
    (got,) = torch.autograd.grad((logprob.exp().detach() * biased_kl(logprob, reference_logprob)).sum(), logits)
    logprob = logits.log_softmax(-1)
    (want,) = torch.autograd.grad((logprob.exp() * (logprob - reference_logprob)).sum(), logits)
    assert (got - want).abs().max() > 0.05


def test_the_kl_estimator_is_a_choice():
    values = example()
    new, old, reference, sequence, _ = values
    zero = (new, old, reference, sequence, torch.zeros(3, dtype=torch.float64))
    for name, term in (
        ("unbiased", unbiased_kl(new, old, reference)),
        ("biased", biased_kl(new, reference)),
    ):
        want = 0.1 * sequence_mean(term, sequence, 3).sum() / 3
        assert loss_of(zero, kl_estimator=name).loss.item() == pytest.approx(want.item(), rel=1e-12)


def test_kl_weights_of_domains_add_up_sequence_by_sequence():
    new, old, reference, sequence, _ = values = example()
    weights = torch.tensor([0.0, 0.3, 0.02], dtype=torch.float64)
    without = loss_of(values, kl_weight=0.0).loss
    kl_N = sequence_mean(unbiased_kl(new, old, reference), sequence, 3)
    want = without + (weights * kl_N).sum() / 3
    assert loss_of(values, kl_weight=weights).loss.item() == pytest.approx(want.item(), rel=1e-12)
    assert loss_of(values, kl_weight=torch.full((3,), 0.1)).loss.item() == pytest.approx(
        loss_of(values).loss.item(), rel=1e-6
    )


def test_without_a_threshold_no_sequence_is_masked():
    _, old, reference, sequence, _ = example()
    drifted = (old - 1.0, old, reference, sequence, torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    assert loss_of(drifted).masked_share == pytest.approx(2 / 3)
    assert loss_of(drifted, sequence_mask_threshold=None).masked_share == 0.0


@pytest.mark.parametrize(
    "proximal,engine,cap,expected", [(0.6, 0.3, 3.0, 2.0), (0.6, 0.1, 3.0, 3.0), (0.1, 0.4, 3.0, 0.25)]
)
def test_truncated_importance_by_hand(proximal, engine, cap, expected):
    got = truncated_importance(torch.tensor([proximal]).log(), torch.tensor([engine]).log(), cap)
    assert got.item() == pytest.approx(expected, rel=1e-6)


def test_truncated_importance_by_hand_in_the_loss():
    # one token, A = 1: pi = 0.55, before the update 0.5, engine 0.2: weight min(2.5, 2) = 2, ratio 1.1, not clipped
    one = [torch.tensor([x], dtype=torch.float64).log() for x in (0.55, 0.2, 0.55)]
    got = grpo_loss(
        *one,
        torch.tensor([0]),
        torch.tensor([1.0], dtype=torch.float64),
        total_sequences=1,
        **{**OPTIONS, "kl_weight": 0.0},
        proximal_logprob_R=torch.tensor([0.5], dtype=torch.float64).log(),
        importance_cap=2.0,
    )
    assert got.loss.item() == pytest.approx(-2.2, rel=1e-9)
    assert got.clipped_share == 0.0
    with pytest.raises(ValueError, match="before the first update"):
        loss_of(example(), importance_cap=2.0)


def test_gradient_of_all_options_against_finite_differences():
    new, old, reference, sequence, advantage = example()

    def loss(x):
        return loss_of(
            (x, old, reference, sequence, advantage),
            kl_weight=torch.tensor([0.1, 0.0, 0.3], dtype=torch.float64),
            kl_estimator="biased",
            proximal_logprob_R=old + 0.1,
            importance_cap=1.05,
        ).loss

    assert torch.autograd.gradcheck(loss, (new.clone().requires_grad_(True),), eps=1e-7, atol=1e-6)


def test_length_penalty_by_hand():
    reward = torch.tensor([1.0, 1.0, 1.0, 0.0])
    got = length_penalised(reward, torch.tensor([20.0, 80.0, 500.0, 80.0]), torch.full((4,), 160.0), 0.2)
    assert got.tolist() == pytest.approx([0.975, 0.9, 0.8, 0.0])


def test_rejection_sampling_is_the_mean_log_probability_of_what_passed():
    new, old, reference, sequence, _ = example()
    got = rft_loss(new, old, reference, sequence, torch.tensor([1.0, 0.0, 1.0]), total_sequences=2)
    assert got.loss.item() == pytest.approx(-float(new[:3].mean() + new[5:].mean()) / 2, rel=1e-9)


def test_on_policy_rejection_sampling_has_the_expected_gradient_of_grpo():
    """Of pass or fail rewards and one update a batch, the two differ in variance and in what easy prompts weigh.

    Over all groups of three answers: GRPO expects (G - 1) times the gradient of pass@1, and RFT, whose groups without
    variance are dropped as well, G (1 - p^(G-1)) times. Nothing but noise, clip and mask tells them apart.
    """
    group = 3
    logits = torch.tensor([0.3, -0.2, 0.5, 0.0], dtype=torch.float64, requires_grad=True)
    passes = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    logprob_V = logits.log_softmax(0)
    pass_at_1 = (logprob_V.exp() * passes).sum()
    (slope,) = torch.autograd.grad(pass_at_1, logits, retain_graph=True)
    expected = {"grpo": torch.zeros_like(slope), "rft": torch.zeros_like(slope)}
    order = torch.arange(group)
    for drawn in itertools.product(range(len(logits)), repeat=group):
        reward = passes[list(drawn)]
        if len(set(reward.tolist())) == 1:
            continue
        new = logprob_V[list(drawn)]
        old = new.detach()
        advantage = group_advantages(reward, torch.zeros(group, dtype=torch.int64))
        options = {**OPTIONS, "kl_weight": 0.0, "total_sequences": 1}
        losses = {
            "grpo": grpo_loss(new, old, old, order, advantage, **options).loss,
            "rft": rft_loss(new, old, old, order, reward, total_sequences=1).loss,
        }
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(-loss, logits, retain_graph=True)
            expected[name] += float(old.sum().exp()) * gradient
    p = float(pass_at_1.detach())
    torch.testing.assert_close(expected["grpo"], (group - 1) * slope)
    torch.testing.assert_close(expected["rft"], group * (1 - p ** (group - 1)) * slope)
