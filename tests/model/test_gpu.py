"""The network on a GPU, with the kernels that run there, against the float64 network on the CPU."""

import pytest
import torch

from model import ModelConfig, PackedContext, Transformer
from model.checkpoint.hugging_face import convert
from model.engine import Engine, SamplingParameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
LENGTHS = [71, 300, 5]


def models(dtype: torch.dtype) -> tuple[Transformer, Transformer]:
    config = ModelConfig.preset("nano", vocab_size=90)
    exact = convert(Transformer(config).initialise(0), torch.float64).eval()
    return exact, convert(Transformer(config).initialise(0), dtype).cuda().eval()


@pytest.mark.parametrize("mode", ["sparse", "dense"])
def test_forward(mode):
    exact, fast = models(torch.float32)
    exact.attention_mode = fast.attention_mode = mode
    ids = torch.randint(90, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = exact(ids, PackedContext.from_lengths(LENGTHS))
        got = fast(ids.cuda(), PackedContext.from_lengths(LENGTHS, "cuda")).cpu().double()
    assert (got - expected).norm() / expected.norm() < 1e-3


def test_training_step_gives_the_same_gradients():
    exact, fast = models(torch.float32)
    ids = torch.randint(90, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    for model, device in ((exact, "cpu"), (fast, "cuda")):
        context = PackedContext.from_lengths(LENGTHS, device)
        context.indexer_loss = "sparse"
        logits = model(ids.to(device), context)
        loss = torch.nn.functional.cross_entropy(logits, ids.to(device)) + torch.stack(context.losses).sum()
        loss.backward()
    for (name, a), b in zip(exact.named_parameters(), fast.parameters(), strict=True):
        if a.grad is not None and float(a.grad.norm()) > 1e-9:
            error = (b.grad.cpu().double() - a.grad).norm() / a.grad.norm()
            assert error < 2e-2, (name, float(error))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
def test_engine_agrees_with_its_own_full_forward(dtype, tolerance):
    _, model = models(dtype)
    engine = Engine(model, stop_token_id=0, max_sequences=8, max_sequence_tokens=200, page_size=64)
    generator = torch.Generator().manual_seed(1)
    for index in range(8):
        prompt = torch.randint(1, 90, (5 + 10 * index,), generator=generator).tolist()
        engine.add(prompt, SamplingParameters(max_new_tokens=60, seed=index))
    done = []
    while engine.live:
        done += [engine.release(turn.handle) for turn in engine.step()]
    for trajectory in done:
        ids = trajectory.token_ids.cuda()
        with torch.no_grad():
            logits = model(ids[:-1], PackedContext.from_lengths([len(ids) - 1], "cuda"))
        logprobs = logits.double().log_softmax(-1).gather(1, ids[1:, None]).squeeze(1).cpu()
        gap = (logprobs - trajectory.logprobs[1:].double())[trajectory.sampled[1:]].abs()
        assert gap.max() < tolerance
