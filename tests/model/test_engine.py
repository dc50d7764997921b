"""The batched incremental decoder against the full forward: same selection, same log-probabilities."""

import pytest
import torch

from model import ModelConfig, PackedContext, Transformer
from model.checkpoint.hugging_face import convert
from model.engine import Engine, EngineFull, SamplingParameters
from model.engine.sampling import sample, top_p_mask, uniform

STOP = 0


def model_of(dtype: torch.dtype, seed: int = 0) -> Transformer:
    config = ModelConfig.preset("micro", vocab_size=50, index_topk=9, num_hidden_layers=3,
                                mlp_layer_types=["dense", "sparse", "sparse"], initializer_range=0.2)  # fmt: skip
    return convert(Transformer(config).initialise(seed), dtype).eval()


def play(engine: Engine, prompts: list[list[int]], replies: list[list[int]], sampling_seed: int = 7):
    """Every sequence writes a turn, gets a reply, writes a second turn."""
    handles = [
        engine.add(p, SamplingParameters(max_new_tokens=11, seed=sampling_seed + i)) for i, p in enumerate(prompts)
    ]
    turns, done = dict.fromkeys(handles, 0), {}
    while engine.live:
        for turn in engine.step():
            turns[turn.handle] += 1
            if turns[turn.handle] == 1:
                assert engine.extend(turn.handle, replies[handles.index(turn.handle)])
            else:
                done[turn.handle] = engine.release(turn.handle)
    return [done[handle] for handle in handles]


def prompts_and_replies(count: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        size = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(1, 50, (size,), generator=generator).tolist()

    return [draw(1, 40) for _ in range(count)], [draw(1, 12) for _ in range(count)]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("step_tokens", [8192, 7])
def test_decoder_equals_full_forward(dtype, tolerance, step_tokens):
    model = model_of(dtype)
    prompts, replies = prompts_and_replies(9)
    engine = Engine(model, stop_token_id=STOP, max_sequences=4, max_sequence_tokens=96, page_size=8,
                    step_tokens=step_tokens)  # fmt: skip
    for trajectory in play(engine, prompts, replies):
        ids = trajectory.token_ids
        context = PackedContext.from_lengths([len(ids) - 1])
        context.record_routing = True
        with torch.no_grad():
            logits = model(ids[:-1], context)
        logprobs = logits.double().log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        sampled = trajectory.sampled[1:]
        assert sampled.sum() > 1
        # the trajectory's own log-probabilities are stored in fp32
        stored = 1e-6 if dtype == torch.float64 else tolerance
        assert (logprobs - trajectory.logprobs[1:].double())[sampled].abs().max() < stored
        assert torch.equal(torch.stack(context.routing).to(torch.int16), trajectory.routing)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("mode", ["sparse", "dense", "window", "random"])
def test_logits_and_selection_token_by_token(dtype, tolerance, mode):
    from model.context import PagedContext

    model, length, page = model_of(dtype), 41, 8
    model.attention_mode = mode
    ids = torch.randint(1, 50, (length,), generator=torch.Generator().manual_seed(2))
    full = PackedContext.from_lengths([length])
    full.record_selections = True
    config = model.config
    width = config.kv_lora_rank + config.qk_rope_head_dim
    caches = dict(
        latent_cache=[torch.zeros(9, page, width, dtype=dtype) for _ in range(3)],
        index_k_cache=[torch.zeros(9, page, config.index_head_dim, dtype=dtype) for _ in range(3)],
    )
    table = torch.tensor([[5, 1, 7, 3, 8, 0]], dtype=torch.int32)
    with torch.no_grad():
        expected = model(ids, full)
        for t in range(length):
            context = PagedContext(
                position_T=torch.tensor([t]), page_table_NP=table, sequence_T=torch.tensor([0]), **caches
            )
            context.record_selections = True
            logits = model(ids[t : t + 1], context)
            if mode == "random":
                continue  # drawn per forward: nothing to compare but that it runs
            assert (logits[0] - expected[t]).abs().max() < tolerance
            for layer, rows in enumerate(context.selections):
                chosen = rows[0][rows[0] >= 0].long()
                order = table[0].tolist()
                positions = torch.tensor([order.index(int(r) // page) * page + int(r) % page for r in chosen])
                wanted = full.selections[layer][t] if mode != "dense" else torch.arange(t + 1)
                assert torch.equal(positions, wanted[wanted >= 0].long())


def test_a_sequence_does_not_depend_on_its_company():
    model = model_of(torch.float64)
    prompts, replies = prompts_and_replies(6, seed=1)
    crowd = play(Engine(model, stop_token_id=STOP, max_sequences=6, max_sequence_tokens=96), prompts, replies)
    for i in range(6):
        engine = Engine(model, stop_token_id=STOP, max_sequences=1, max_sequence_tokens=96, page_size=4)
        alone = play(engine, prompts[i : i + 1], replies[i : i + 1], sampling_seed=7 + i)[0]
        assert torch.equal(alone.token_ids, crowd[i].token_ids)
        assert engine.live == 0
        assert len(engine._free_pages) == 24


def test_sampling_follows_the_distribution():
    """20,000 draws against the softmax, chi-square at p = 1e-4; and top-p never leaves its set."""
    from scipy.stats import chisquare

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)) * 2
    draws = 20000
    numbers = torch.from_numpy(uniform(torch.arange(draws).numpy(), torch.full((draws,), 3).numpy()))
    many = logits.expand(draws, -1)
    ones = torch.ones(draws, dtype=torch.float64)
    tokens, logprobs, mask = sample(many, ones * 1.3, ones, numbers)
    expected = (logits[0].double() / 1.3).softmax(-1)
    assert mask is None
    assert chisquare(torch.bincount(tokens, minlength=12).numpy(), (expected * draws).numpy()).pvalue > 1e-4
    assert torch.allclose(logprobs.double(), expected[tokens].log(), atol=1e-6)
    tokens, logprobs, mask = sample(many, ones, ones * 0.7, numbers)
    kept = mask[0].nonzero().flatten()
    probability = logits[0].double().softmax(-1)
    assert probability[kept].sum() >= 0.7
    assert probability[kept].sum() - probability[kept].min() < 0.7
    assert set(tokens.tolist()) <= set(kept.tolist())
    assert torch.allclose(logprobs.double().exp(), probability[tokens] / probability[kept].sum(), atol=1e-6)


def test_top_p_ties_go_to_the_lower_id():
    mask = top_p_mask(torch.tensor([[0.25, 0.25, 0.25, 0.25]]), torch.tensor([0.5]))
    assert mask.tolist() == [[True, True, False, False]]


def test_a_queue_that_cannot_move_is_an_error_not_a_hang():
    engine = Engine(model_of(torch.float32), stop_token_id=STOP, max_sequences=1, max_sequence_tokens=16)
    first = engine.add([1, 2], SamplingParameters(max_new_tokens=2))
    second = engine.add([1, 2], SamplingParameters(max_new_tokens=2))
    while not engine.step():
        pass
    with pytest.raises(RuntimeError, match="release"):
        engine.step()
    engine.release(first)
    while not engine.step():
        pass
    assert engine.release(second).sampled.sum() > 0


def test_what_does_not_fit_is_refused_by_name():
    engine = Engine(model_of(torch.float32), stop_token_id=STOP, max_sequences=1, max_sequence_tokens=16)
    with pytest.raises(EngineFull, match="leaves no room"):
        engine.add(list(range(1, 17)), SamplingParameters())
    with pytest.raises(ValueError, match="token ids"):
        engine.add([50], SamplingParameters())
    with pytest.raises(ValueError, match="temperature"):
        SamplingParameters(temperature=-1)
    handle = engine.add([1, 2, 3], SamplingParameters(max_new_tokens=20))
    while engine.live:
        engine.step()
    assert engine.extend(handle, [1] * 20) is False
    assert len(engine.release(handle)) <= 16
