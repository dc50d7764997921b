"""Checkpoints that are whole come back bit for bit; those that are not are refused by name."""

import json

import pytest
import torch

from model import ModelConfig, Transformer
from model.checkpoint import CheckpointError, hugging_face, load_model, load_tokenizer, save_model, word_tokenizer
from model.checkpoint.hugging_face import config_from_hugging_face


@pytest.fixture
def model() -> Transformer:
    return Transformer(ModelConfig.preset("micro", vocab_size=40)).initialise(3).eval()


def same_weights(a: Transformer, b: Transformer) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_round_trip(model, tmp_path):
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert same_weights(model, again)
    assert again.config == model.config
    assert torch.equal(again.frequencies, model.frequencies)
    assert not again.frequencies.is_meta
    assert not again.training


def test_shards(model, tmp_path, monkeypatch):
    monkeypatch.setattr(hugging_face, "SHARD_BYTES", 20_000)
    save_model(model, tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert same_weights(model, load_model(tmp_path))
    next(iter(sorted(tmp_path.glob("model-*.safetensors")))).unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_model(tmp_path)


def test_low_precision_keeps_what_must_stay_precise(model, tmp_path):
    save_model(model, tmp_path)
    low = load_model(tmp_path, dtype=torch.bfloat16)
    precise = {name for name, value in low.state_dict().items() if value.dtype == torch.float32}
    assert {name.split(".", 3)[-1] for name in precise} == {
        "self_attn.indexer.weights_proj.weight",
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
    }


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer at"):
        load_tokenizer(tmp_path)


def test_a_damaged_file_is_refused(model, tmp_path):
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "change,told",
    [
        ({"model_type": "llama"}, "model_type must be 'deepseek_v32', got 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"num_key_value_heads": 1}, "num_key_value_heads must be"),
        ({"quantization_config": {"bits": 8}}, "convert the checkpoint to bf16"),
        ({"index_topk": 0}, "index_topk"),
        ({"mlp_layer_types": ["dense"]}, "one type per layer"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_a_config_that_is_not_computed_is_refused(model, tmp_path, change, told):
    save_model(model, tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=told):
        load_model(tmp_path)


def test_weights_that_do_not_fit_are_named(model, tmp_path):
    save_model(model, tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "vocab_size": 41}))
    with pytest.raises(CheckpointError, match=r"expected \(41, 64\), got \(40, 64\)"):
        load_model(tmp_path)
    path.write_text(json.dumps({**values, "num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "dense"]}))
    with pytest.raises(CheckpointError, match=r"missing model\.layers\.2"):
        load_model(tmp_path)


def test_what_a_config_leaves_out_is_what_stock_assumes():
    transformers = pytest.importorskip("transformers")
    stock = transformers.DeepseekV32Config()
    ours = config_from_hugging_face({"model_type": "deepseek_v32", **_required(stock)})
    for name in ("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(stock, name), name
    assert ours.mlp_layer_types == stock.mlp_layer_types


def _required(stock) -> dict:
    fields = [name for name, field in ModelConfig.model_fields.items() if field.is_required()]
    return {name: getattr(stock, name) for name in fields if name != "mlp_layer_types"}


def test_the_tokenizer_maps_words_and_refuses_a_bad_vocabulary():
    tokenizer = word_tokenizer(["<|unknown|>", "<|end|>"], ["ada", "core"], "<|unknown|>")
    assert tokenizer.encode("core <|end|> zebra ada").ids == [3, 1, 0, 2]
    with pytest.raises(ValueError, match="twice"):
        word_tokenizer(["a"], ["b", "a"], "a")
    with pytest.raises(ValueError, match="white space"):
        word_tokenizer(["a"], ["b c"], "a")
