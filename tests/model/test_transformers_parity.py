"""The network against stock `transformers`, both directions: a checkpoint made here loads there, and the reverse."""

import pytest
import torch

from model import ModelConfig, PackedContext, Transformer
from model.checkpoint import load_model, save_model

transformers = pytest.importorskip("transformers")

BASE = dict(
    vocab_size=61, hidden_size=48, intermediate_size=80, moe_intermediate_size=24, num_hidden_layers=3,
    num_attention_heads=3, n_routed_experts=6, num_experts_per_tok=2, mlp_layer_types=["dense", "sparse", "sparse"],
    q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=14, index_n_heads=8,
    index_head_dim=12, index_topk=7, initializer_range=0.15, max_position_embeddings=256, n_group=1, topk_group=1,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64, beta_fast=32.0,
    beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
)  # fmt: skip
CONFIGS = {
    "odd sizes": {},
    "one layer, top-k 1": dict(num_hidden_layers=1, mlp_layer_types=["sparse"], index_topk=1),
    "top-k over the length": dict(index_topk=500),
    "grouped experts": dict(n_routed_experts=12, n_group=4, topk_group=2, num_experts_per_tok=3),
    "yarn": dict(rope_parameters=YARN),
    "no weight normalisation, scaled, two shared experts": dict(
        norm_topk_prob=False, routed_scaling_factor=2.5, n_shared_experts=2, index_n_heads=11, index_topk=13
    ),
    "tied embeddings, biases, rope only in the indexer": dict(
        tie_word_embeddings=True, attention_bias=True, index_head_dim=8, index_n_heads=16, num_attention_heads=5
    ),
}


def random_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config).initialise(1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("bias", "norm.weight")):
                tensor += 0.1 * torch.randn_like(tensor)
    return model.eval()


def no_tie_at_the_boundary(model: Transformer, ids: torch.Tensor) -> bool:
    """Stock's order among ties is arbitrary: the comparison means something only without one at the k-th score."""
    from kernels.indexer_scores import indexer_scores

    gaps = []
    context = PackedContext.from_lengths([len(ids)])
    select = context.select

    def watch(layer, q, k, weight, topk):
        scores = indexer_scores(q, k, weight, context.key_start_T, context.key_end_T)
        for row in range(topk, len(ids)):
            ordered = scores[row, : row + 1].sort(descending=True).values
            gaps.append(float(ordered[topk - 1] - ordered[topk]))
        return select(layer, q, k, weight, topk)

    context.select = watch
    with torch.no_grad():
        model(ids, context)
    return not gaps or min(gaps) > 1e-7


def sequences(vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (2, 37), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoint_made_here_gives_the_same_logits_in_stock(name, tmp_path):
    model = random_model(ModelConfig(**{**BASE, **CONFIGS[name]}))
    ids = sequences(BASE["vocab_size"])
    assert all(no_tie_at_the_boundary(model, row) for row in ids)
    save_model(model, tmp_path)
    stock, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(stock).__name__ == "DeepseekV32ForCausalLM"
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    with torch.no_grad():
        theirs = stock.eval()(ids).logits
        ours = model(ids.flatten(), PackedContext.from_lengths([37, 37])).view_as(theirs)
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoint_made_by_stock_gives_the_same_logits_here(name, tmp_path):
    values = {**BASE, **CONFIGS[name]}
    values["num_key_value_heads"] = values["num_attention_heads"]
    values.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": 10000.0})
    torch.manual_seed(5)
    stock = transformers.DeepseekV32ForCausalLM(transformers.DeepseekV32Config(**values)).eval()
    stock.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    ids = sequences(values["vocab_size"])
    assert all(no_tie_at_the_boundary(model, row) for row in ids)
    with torch.no_grad():
        theirs = stock(ids).logits
        ours = model(ids.flatten(), PackedContext.from_lengths([37, 37])).view_as(theirs)
    assert (ours - theirs).abs().max() < 1e-4
