"""Configuration of a `deepseek_v32` network, with the field names of its Hugging Face config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PRESETS = Path(__file__).parent / "presets"


class RopeParameters(BaseModel):
    """Rotary embedding; `yarn` extends a trained context by `factor` (arXiv 2309.00071)."""

    model_config = ConfigDict(extra="forbid")

    rope_type: Literal["default", "yarn"] = "default"
    rope_theta: float = Field(10000.0, gt=1, description="base of the frequencies")
    factor: float = Field(1.0, ge=1, description="context extension; yarn only")
    original_max_position_embeddings: int | None = Field(None, description="tokens before the extension; yarn only")
    beta_fast: float = Field(32.0, description="rotations in the original context above which a dimension is kept")
    beta_slow: float = Field(1.0, description="rotations below which a dimension is interpolated")
    mscale: float | None = None
    mscale_all_dim: float | None = Field(None, description="scales the softmax temperature with the extension")
    attention_factor: float | None = Field(None, description="overrides the factor on cos and sin that mscale implies")
    truncate: bool = Field(True, description="round the correction range to whole dimensions")


class ModelConfig(BaseModel):
    """Sizes of the network. Unknown keys are errors; `from_hugging_face` drops those that do not change the maths."""

    model_config = ConfigDict(extra="forbid")

    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="width of the dense MLP")
    moe_intermediate_size: int = Field(gt=0, description="width of one expert")
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    n_routed_experts: int = Field(gt=0)
    n_shared_experts: int = Field(1, ge=1)
    num_experts_per_tok: int = Field(gt=0)
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    n_group: int = Field(1, ge=1, description="groups of experts; the best topk_group of them are eligible")
    topk_group: int = Field(1, ge=1)
    mlp_layer_types: list[Literal["dense", "sparse"]] = Field(description="MLP of each layer; sparse = MoE")
    q_lora_rank: int = Field(gt=0)
    kv_lora_rank: int = Field(gt=0, description="width of the latent KV")
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    index_n_heads: int = Field(gt=0, description="lightning indexer heads")
    index_head_dim: int = Field(gt=0)
    index_topk: int = Field(gt=0, description="keys that a query attends to")
    max_position_embeddings: int = Field(4096, gt=0)
    rope_parameters: RopeParameters = Field(default_factory=RopeParameters)
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        checks = {
            "mlp_layer_types must name one type per layer": len(self.mlp_layer_types) == self.num_hidden_layers,
            "qk_rope_head_dim must be even": self.qk_rope_head_dim % 2 == 0,
            "index_head_dim must be at least qk_rope_head_dim": self.index_head_dim >= self.qk_rope_head_dim,
            "n_routed_experts must be a multiple of n_group": self.n_routed_experts % self.n_group == 0,
            "topk_group must not exceed n_group": self.topk_group <= self.n_group,
            "a group needs at least two experts": self.n_routed_experts // self.n_group >= 2,
            "num_experts_per_tok must fit the eligible experts": self.num_experts_per_tok
            <= self.n_routed_experts // self.n_group * self.topk_group,
        }
        broken = [rule for rule, holds in checks.items() if not holds]
        if broken:
            raise ValueError("; ".join(broken))
        return self

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> ModelConfig:
        """The preset `name` (a file in model/presets), with fields replaced. ValueError lists the presets."""
        path = PRESETS / f"{name}.json"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.json")))
            raise ValueError(f"unknown model preset {name!r}; known: {known}")
        return cls.model_validate({**cls.model_validate_json(path.read_text()).model_dump(), **overrides})
