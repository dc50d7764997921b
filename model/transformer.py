"""The `deepseek_v32` transformer: MLA with DSA, dense MLPs and mixtures of experts. One forward, any context.

Module names are those of the Hugging Face checkpoint, so that saving and loading rename nothing but the experts.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.attention import LatentAttention
from model.config import ModelConfig
from model.context import Context, Selection
from model.indexer import LightningIndexer
from model.moe import MLP, MixtureOfExperts, Router
from model.rope import cos_sin, inverse_frequencies


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.self_attn = LatentAttention(config, index)
        self.is_moe = config.mlp_layer_types[index] == "sparse"
        self.mlp = MixtureOfExperts(config) if self.is_moe else MLP(config.hidden_size, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        x_TC: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        context: Context,
        selection: Selection,
        experts_TK: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Output [T, C], expert ids [T, K] of a MoE layer, the lightning indexer's loss where asked for."""
        attended_TC, loss = self.self_attn(self.input_layernorm(x_TC), cos, sin, context, selection)
        x_TC = x_TC + attended_TC
        h_TC = self.post_attention_layernorm(x_TC)
        if not self.is_moe:
            return x_TC + self.mlp(h_TC), None, loss
        out_TC, experts_TK = self.mlp(h_TC, experts_TK)
        return x_TC + out_TC, experts_TK, loss


class Backbone(nn.Module):
    """Embedding, layers and final norm; the `model.` prefix of the checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class Transformer(nn.Module):
    """attention_mode picks what a query attends to, on the same weights: the lightning indexer's top-k ("sparse"),
    every key ("dense"), the last top-k keys ("window") or top-k random keys ("random")."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.attention_mode: Selection = "sparse"
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        frequencies, self.rope_factor = inverse_frequencies(config.rope_parameters, config.qk_rope_head_dim)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.frequencies: torch.Tensor

    @torch.no_grad()
    def initialise(self, seed: int) -> Transformer:
        """Random weights from `seed`: normal with the config's standard deviation, residual outputs scaled down."""
        generator = torch.Generator().manual_seed(seed)
        residual_scale = (2 * self.config.num_hidden_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = self.config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                std *= residual_scale
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))
        return self

    def forward(self, token_ids_T: torch.Tensor, context: Context) -> torch.Tensor:
        """Logits [T, vocabulary] in the weights' dtype of the packed tokens (int64 [T])."""
        return self.lm_head(self.hidden(token_ids_T, context))

    def hidden(self, token_ids_T: torch.Tensor, context: Context) -> torch.Tensor:
        """Normalised hidden states [T, hidden size]; callers that need few logits apply `lm_head` themselves."""
        x_TC = self.model.embed_tokens(token_ids_T)
        cos, sin = cos_sin(context.position_T, self.frequencies, self.rope_factor, x_TC.dtype)
        moe_layer = 0
        for layer in self.model.layers:
            kept = None
            if layer.is_moe and context.kept_routing is not None:
                kept = context.kept_routing[moe_layer]
            arguments = (x_TC, cos, sin, context, self.attention_mode, kept)
            if context.checkpoint_layers and torch.is_grad_enabled():
                x_TC, experts_TK, loss = checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TC, experts_TK, loss = layer(*arguments)
            if loss is not None:
                context.losses.append(loss)
            if layer.is_moe:
                moe_layer += 1
                if context.record_routing:
                    context.routing.append(experts_TK.detach())
        return self.model.norm(x_TC)

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def indexer_parameters(self) -> list[nn.Parameter]:
        indexers = [module for module in self.modules() if isinstance(module, LightningIndexer)]
        return [parameter for indexer in indexers for parameter in indexer.parameters()]

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The network's matrices inside the layers (two dimensions, or a stack of experts), without the routers'."""
        apart = {id(p) for p in self.indexer_parameters()} | {id(router.weight) for router in self.routers()}
        return [p for p in self.model.layers.parameters() if p.dim() >= 2 and id(p) not in apart]

    def network_parameters(self) -> list[nn.Parameter]:
        """All parameters but the lightning indexers'."""
        indexer = {id(p) for p in self.indexer_parameters()}
        return [p for p in self.parameters() if id(p) not in indexer]
