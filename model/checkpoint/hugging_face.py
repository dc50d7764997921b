"""`DeepseekV32ForCausalLM` on disk: config.json and safetensors, the names that stock `transformers` reads.

In memory the experts of a layer are two stacked tensors; on disk each expert has its own three.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.config import ModelConfig
from model.transformer import Transformer

MODEL_TYPE, ARCHITECTURE = "deepseek_v32", "DeepseekV32ForCausalLM"
SHARD_BYTES = 4 << 30
# fields of config.json that say nothing about the maths of a forward, or that are derived from others
IGNORED = {
    "architectures", "model_type", "transformers_version", "dtype", "torch_dtype", "use_cache", "head_dim",
    "qk_head_dim", "attention_dropout", "output_router_logits", "layer_types", "hidden_act",
    "num_key_value_heads", "mlp_bias",
    "first_k_dense_replace", "num_local_experts", "ep_size", "num_nextn_predict_layers", "quantization_config",
    "pretraining_tp", "scoring_func", "topk_method", "moe_layer_freq", "_name_or_path", "output_hidden_states",
    "output_attentions", "return_dict", "is_encoder_decoder", "id2label", "label2id", "problem_type",
    "chunk_size_feed_forward",
}  # fmt: skip

# what stock `transformers` assumes for a key that config.json lacks, where ModelConfig's own default differs
STOCK_DEFAULTS = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "max_position_embeddings": 163840}


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged or of another architecture; the message says what and where."""


def config_from_hugging_face(values: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig of a Hugging Face config. Raises CheckpointError for what this network does not compute."""
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{where}: model_type must be {MODEL_TYPE!r}, got {values.get('model_type')!r}")
    heads = values.get("num_attention_heads")
    fixed = {"hidden_act": "silu", "num_key_value_heads": heads, "mlp_bias": False}
    for key, wanted in fixed.items():
        if values.get(key, wanted) != wanted:
            raise CheckpointError(f"{where}: {key} must be {wanted!r}, got {values[key]!r}")
    if values.get("quantization_config"):
        raise CheckpointError(f"{where}: quantised weights are not read; convert the checkpoint to bf16 first")
    fields = {**STOCK_DEFAULTS, **{k: v for k, v in values.items() if k not in IGNORED and v is not None}}
    if "mlp_layer_types" not in fields:
        layers = values.get("num_hidden_layers", 0)
        dense = min(values.get("first_k_dense_replace", 3), layers)
        fields["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (layers - dense)
    rope = dict(fields.get("rope_parameters") or {})
    rope.pop("partial_rotary_factor", None)
    if rope.get("rope_type") == "default":
        rope = {key: rope[key] for key in ("rope_type", "rope_theta") if key in rope}
    fields["rope_parameters"] = rope
    if isinstance(fields.get("eos_token_id"), list):
        fields["eos_token_id"] = fields["eos_token_id"][0]
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise CheckpointError(f"{where}: {problems}") from None


def config_to_hugging_face(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    values = config.model_dump(exclude_none=True)
    rope = values["rope_parameters"]
    if rope["rope_type"] == "default":
        rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    return {
        **values,
        "rope_parameters": rope,
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "num_key_value_heads": config.num_attention_heads,
        "hidden_act": "silu",
        "head_dim": config.qk_rope_head_dim,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _to_disk(state: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ".mlp.experts." not in name:
            tensors[name] = value.contiguous()
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, weight in enumerate(value):
            if kind == "down_proj":
                tensors[f"{prefix}.{expert}.down_proj.weight"] = weight.contiguous()
            else:
                gate, up = weight.chunk(2)
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up.contiguous()
    return tensors


def _from_disk(tensors: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    beyond = re.compile(rf"model\.layers\.{config.num_hidden_layers}\.")  # multi-token prediction, not used here
    for name, value in tensors.items():
        match = re.fullmatch(r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if beyond.match(name):
            continue
        if match:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = value
        else:
            state[name] = value
    for prefix, by_expert in experts.items():
        parts = [by_expert[index] for index in sorted(by_expert)]
        state[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat((part["gate"], part["up"])) for part in parts])
        state[f"{prefix}.down_proj"] = torch.stack([part["down"] for part in parts])
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


def save_model(model: Transformer, directory: Path | str) -> None:
    """Write config.json and the weights (shards of at most 4 GiB with an index) into `directory`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = model.lm_head.weight.dtype
    config = config_to_hugging_face(model.config, dtype)
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shards: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for name, value in _to_disk(model.state_dict(), model.config).items():
        size = value.numel() * value.element_size()
        if shards[-1] and used + size > SHARD_BYTES:
            shards.append({})
            used = 0
        shards[-1][name] = value.detach().cpu()
        used += size
    if len(shards) == 1:
        save_file(shards[0], directory / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, file))
    total = sum(v.numel() * v.element_size() for shard in shards for v in shard.values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [directory / "model.safetensors"]


def load_model(directory: Path | str, dtype: torch.dtype | None = torch.float32) -> Transformer:
    """The network in `directory`, in evaluation mode; dtype None keeps the stored one.

    Router biases and the indexer's head weights stay in fp32 or above, as in stock `transformers`.
    Raises CheckpointError: not there, another architecture, damaged, or tensors that do not fit the config.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"no checkpoint at {directory}: config.json is missing")
    try:
        values = json.loads((directory / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{directory / 'config.json'} is not JSON: {error}") from None
    config = config_from_hugging_face(values, where=str(directory / "config.json"))
    tensors: dict[str, torch.Tensor] = {}
    for file in _weight_files(directory):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing; fetch the checkpoint again")
        try:
            with safe_open(file, framework="pt") as reader:
                tensors.update({name: reader.get_tensor(name) for name in reader.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged ({error}); fetch the checkpoint again") from None
    state = _from_disk(tensors, config)
    with torch.device("meta"):
        model = Transformer(config)
    expected = model.state_dict()
    wrong = [
        f"{name}: expected {tuple(expected[name].shape)}, got {tuple(state[name].shape)}"
        for name in expected.keys() & state.keys()
        if expected[name].shape != state[name].shape
    ]
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if wrong or missing or surplus:
        parts = [*wrong, *(f"missing {name}" for name in missing), *(f"unknown {name}" for name in surplus)]
        raise CheckpointError(f"weights in {directory} do not fit config.json: " + "; ".join(parts[:5]))
    model.load_state_dict(state, assign=True)
    # buffers that no checkpoint holds were left on the meta device
    no_layers = config.model_copy(update={"num_hidden_layers": 0, "mlp_layer_types": []})
    model.frequencies = Transformer(no_layers).frequencies
    if dtype is not None:
        convert(model, dtype)
    return model.requires_grad_(True).eval()


def convert(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Cast the weights to `dtype`, keeping router weights, router biases and indexer head weights at fp32 or above."""
    precise = torch.promote_types(dtype, torch.float32)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        keep = name.endswith(("mlp.gate.weight", "e_score_correction_bias", "weights_proj.weight", "frequencies"))
        tensor.data = tensor.data.to(precise if keep else dtype)
    return model
