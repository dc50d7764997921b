"""The learner against the engine: with the same weights, both give every sampled token the same log-probability."""

import pytest
import torch

from components.post_training.learner import logprobs, micro_batches, pack_trajectories
from model import ModelConfig, PackedContext, Transformer
from model.engine import Engine, SamplingParameters


def trajectories(model: Transformer, top_p: float, temperature: float = 0.8, count: int = 7):
    engine = Engine(model, stop_token_id=0, max_sequences=count, max_sequence_tokens=64, page_size=8)
    generator = torch.Generator().manual_seed(4)
    for index in range(count):
        prompt = torch.randint(1, 50, (3 + 2 * index,), generator=generator).tolist()
        engine.add(prompt, SamplingParameters(temperature, top_p, max_new_tokens=15, seed=index))
    done = []
    while engine.live:
        done += [engine.release(turn.handle) for turn in engine.step()]
    return done


@pytest.fixture(scope="module")
def model() -> Transformer:
    config = ModelConfig.preset("micro", vocab_size=50, index_topk=9, initializer_range=0.3)
    return Transformer(config).initialise(0).eval()


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_same_weights_same_log_probabilities(model, top_p):
    done = trajectories(model, top_p)
    batch = pack_trajectories(done, [0.0] * len(done), 50, keep_routing=True)
    with torch.no_grad():
        logprob, entropy = logprobs(model, batch)
    assert (logprob - batch.old_logprob_R).abs().max() < 1e-4
    assert entropy.min() >= 0
    assert torch.equal(torch.bincount(batch.sequence_R), torch.tensor([int(t.sampled.sum()) for t in done]))


def test_without_the_sampling_mask_the_ratio_is_the_kept_mass(model):
    """What Keep Sampling Mask repairs: pi without the mask is pi_old times the mass that top-p kept."""
    done = trajectories(model, 0.7, temperature=1.0)
    batch = pack_trajectories(done, [0.0] * len(done), 50, keep_routing=True)
    kept = batch.kept_RV
    batch.kept_RV = None
    with torch.no_grad():
        full, _ = logprobs(model, batch)
    ratio = (full - batch.old_logprob_R).exp()
    assert kept is not None
    assert ratio.max() < 1
    assert ratio.min() > 0.69


def test_kept_routing_is_used(model):
    done = trajectories(model, 1.0)
    batch = pack_trajectories(done, [0.0] * len(done), 50, keep_routing=True)
    with torch.no_grad():
        kept, _ = logprobs(model, batch)
        batch.routing = [torch.stack((r.flip(0)[:, 0], (r.flip(0)[:, 0] + 1) % 4), 1) for r in batch.routing]
        other, _ = logprobs(model, batch)
    assert (kept - other).abs().max() > 1e-3


def test_a_record_that_does_not_fit_is_refused(model):
    done = trajectories(model, 0.7)
    done[0].sampling_masks = done[0].sampling_masks[:-1]
    with pytest.raises(ValueError, match="sampling masks"):
        pack_trajectories(done, [0.0] * len(done), 50, keep_routing=True)
    done = trajectories(model, 1.0)
    done[1].temperature = 0.5
    with pytest.raises(ValueError, match="temperature"):
        pack_trajectories(done, [0.0] * len(done), 50, keep_routing=True)


def test_micro_batches_hold_every_trajectory_once(model):
    lengths = [len(t) for t in trajectories(model, 1.0)]
    parts = list(micro_batches(lengths, 60))
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in part) <= 60 or len(part) == 1 for part in parts)
    assert len(parts) > 1


def recorded(model: Transformer, count: int = 7):
    """Trajectories with what the indexer selected; several pages each, so that cache rows are not positions."""
    engine = Engine(
        model, stop_token_id=0, max_sequences=3, max_sequence_tokens=64, page_size=8, record_selections=True
    )
    for index in range(count):
        engine.add(
            list(range(1, 12 + 3 * index)), SamplingParameters(1.0, 1.0, max_new_tokens=5 + 3 * index, seed=index)
        )
    done = []
    while engine.live:
        done += [engine.release(turn.handle) for turn in engine.step()]
    return done


def test_engine_and_learner_select_the_same_keys_and_experts(model):
    done = recorded(model)
    batch = pack_trajectories(done, [0.0] * len(done), 50, keep_routing=True, keep_selection=True)
    context = PackedContext.from_lengths(batch.lengths)
    context.record_selections = context.record_routing = True
    with torch.no_grad():
        model.hidden(batch.inputs_T, context)
    assert len(context.selections) == len(batch.selections) == model.config.num_hidden_layers
    for own_TK, kept_TK in zip(context.selections, batch.selections, strict=True):
        own_TK = context.positions_of(own_TK)
        assert torch.equal(own_TK, kept_TK[:, : own_TK.shape[1]])
        assert (kept_TK[:, own_TK.shape[1] :] == -1).all()
    for own_TK, kept_TK in zip(context.routing, batch.routing, strict=True):
        assert torch.equal(own_TK, kept_TK)


def test_kept_selection_is_used(model):
    done = recorded(model)
    batch = pack_trajectories(done, [0.0] * len(done), 50, keep_routing=True, keep_selection=True)
    with torch.no_grad():
        kept, _ = logprobs(model, batch)
        own, _ = logprobs(model, batch, keep_selection=False)
        assert (kept - batch.old_logprob_R).abs().max() < 1e-4
        assert (kept - own).abs().max() < 1e-5
        # the first key alone, everywhere
        batch.selections = [torch.where(torch.arange(s.shape[1]) == 0, 0, -1).expand_as(s) for s in batch.selections]
        first, _ = logprobs(model, batch)
    assert (kept - first).abs().max() > 1e-3


def test_kept_selection_needs_a_record(model):
    done = trajectories(model, 1.0)
    with pytest.raises(ValueError, match="record_selections"):
        pack_trajectories(done, [0.0] * len(done), 50, keep_routing=True, keep_selection=True)


def test_a_learner_that_keeps_no_sampling_masks_sees_the_whole_vocabulary(model):
    done = trajectories(model, 0.7)
    assert pack_trajectories(done, [0.0] * len(done), 50, keep_routing=True, keep_sampling_masks=False).kept_RV is None
