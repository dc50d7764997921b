"""Who learns from what (arXiv 2512.02556, Eq. 3 and 4), the router's bias, kept routing, and the attention modes."""

import pytest
import torch
import torch.nn.functional as F

from model import ModelConfig, PackedContext, Transformer
from model.moe import balance, expert_load

LENGTHS = [23, 31, 9]


@pytest.fixture
def model() -> Transformer:
    config = ModelConfig.preset("micro", vocab_size=40, index_topk=6, initializer_range=0.2)
    return Transformer(config).initialise(0)


def forward(model: Transformer, mode: str, loss: str, **options):
    model.attention_mode = mode
    ids = torch.randint(40, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    context = PackedContext.from_lengths(LENGTHS)
    context.indexer_loss = loss
    for name, value in options.items():
        setattr(context, name, value)
    return ids, context, model(ids, context)


@pytest.mark.parametrize("mode,loss", [("sparse", "sparse"), ("dense", "dense")])
def test_the_indexer_learns_from_the_kl_and_from_nothing_else(model, mode, loss):
    ids, context, logits = forward(model, mode, loss)
    assert len(context.losses) == model.config.num_hidden_layers
    network, indexer = model.network_parameters(), model.indexer_parameters()
    language = F.cross_entropy(logits, ids.roll(-1))
    assert all(g is None for g in torch.autograd.grad(language, indexer, allow_unused=True, retain_graph=True))
    kl = torch.stack(context.losses).sum()
    assert all(g is None for g in torch.autograd.grad(kl, network, allow_unused=True, retain_graph=True))
    gradients = torch.autograd.grad(kl, indexer)
    assert all(float(g.abs().max()) > 0 for g in gradients)


@pytest.mark.parametrize("mode,loss", [("sparse", "sparse"), ("dense", "dense")])
def test_the_losses_equal_the_equations_written_out(model, mode, loss):
    """KL(p || softmax(I)) per query over its keys (or its selected keys), in float64, from scratch."""
    model = model.double()
    captured = []

    def capture(module, inputs, output):
        captured.append(output)

    layer = model.model.layers[0].self_attn
    layer.indexer.register_forward_hook(capture)
    queries = []
    attend = layer._attend

    def watch(q, kv, index, context, selection):
        queries.append((q, kv))
        return attend(q, kv, index, context, selection)

    layer._attend = watch
    _, context, _ = forward(model, mode, loss, record_selections=True)
    (q, k, weight), (query, kv) = captured[0], queries[0]
    total, row = 0.0, 0
    for length in LENGTHS:
        for t in range(length):
            keys = list(range(row, row + t + 1))
            if mode == "sparse":
                keys = [int(r) for r in context.selections[0][row + t] if r >= 0]
                assert len(keys) == min(t + 1, 6)
            score = (torch.relu(q[row + t] @ k[keys].T) * weight[row + t][:, None]).sum(0)
            attention = ((query[row + t] @ kv[keys].T) * layer.scale).softmax(-1).mean(0)
            total += float((attention * (attention.log() - score.log_softmax(-1))).sum().detach())
        row += length
    assert float(context.losses[0]) == pytest.approx(total / sum(LENGTHS), rel=1e-9)


def test_the_selection_is_the_exact_top_k_of_the_indexer(model):
    """Brute force, ties to the lowest position, ascending."""
    captured = []
    model.model.layers[1].self_attn.indexer.register_forward_hook(lambda m, i, output: captured.append(output))
    with torch.no_grad():
        _, context, _ = forward(model.double(), "sparse", "none", record_selections=True)
    (q, k, weight), row = captured[0], 0
    for length in LENGTHS:
        for t in range(length):
            scores = [float((torch.relu(q[row + t] @ k[row + s]) * weight[row + t]).sum()) for s in range(t + 1)]
            best = sorted(sorted(range(t + 1), key=lambda s: (-scores[s], s))[:6])
            chosen = context.selections[1][row + t]
            assert [int(r) - row for r in chosen if r >= 0] == best
        row += length


def test_with_a_top_k_over_the_length_all_modes_agree(model):
    model.config.index_topk = 64
    for layer in model.model.layers:
        layer.self_attn.config = model.config
    outputs = []
    with torch.no_grad():
        for mode in ("sparse", "dense", "window", "random"):
            outputs.append(forward(model.double(), mode, "none")[2])
    for other in outputs[1:]:
        assert (outputs[0] - other).abs().max() < 1e-12


def test_checkpointing_layers_changes_no_gradient(model):
    gradients = []
    for checkpoint_layers in (False, True):
        model.zero_grad()
        ids, context, logits = forward(model.double(), "sparse", "sparse", checkpoint_layers=checkpoint_layers)
        (F.cross_entropy(logits, ids) + torch.stack(context.losses).sum()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_kept_routing_replays_the_recorded_experts(model):
    with torch.no_grad():
        _, recorded, logits = forward(model, "sparse", "none", record_routing=True)
        for router in model.routers():
            router.e_score_correction_bias.copy_(torch.tensor([5.0, 5.0, -5.0, -5.0]))
        _, _, moved = forward(model, "sparse", "none")
        _, _, kept = forward(model, "sparse", "none", kept_routing=recorded.routing)
    assert torch.equal(kept, logits)
    assert (moved - logits).abs().max() > 1e-3


def test_the_router_bias_evens_out_the_load(model):
    router, generator = model.routers()[0], torch.Generator().manual_seed(0)
    x = torch.randn(512, model.config.hidden_size, generator=generator) + 0.5
    loads = []
    for _ in range(300):
        experts, _ = router(x, None)
        load = expert_load(router, experts)
        loads.append(load / load.sum())
        balance(router, load, 0.01)
    assert loads[0].max() > 0.3
    assert loads[-1].max() < 0.28
