"""Multi-head latent attention over the keys that the lightning indexer selects (arXiv 2512.02556, section 2.1).

DSA runs MLA in its MQA mode: the up-projection of keys is absorbed into the query, so that all heads share one latent
key-value row per token, and only selected rows are read.
Shape suffixes: T tokens, S key rows, H heads, C hidden, R query latent, L kv_lora_rank, N nope, P rope, V value,
K top-k.
"""

from __future__ import annotations

import torch
from torch import nn

from kernels.attention_target import attention_target
from kernels.dense_attention import dense_attention
from kernels.indexer_loss import indexer_loss_dense, indexer_loss_sparse
from kernels.sparse_attention import sparse_attention
from model.config import ModelConfig
from model.context import Context, PackedContext, Selection
from model.indexer import LightningIndexer
from model.rope import rotate_interleaved, softmax_scale


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.scale = config, layer, softmax_scale(config)
        heads, bias = config.num_attention_heads, config.attention_bias
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=bias)
        self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=1e-6)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * (nope + rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, config.kv_lora_rank + rope, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(config.kv_lora_rank, heads * (nope + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=bias)
        self.indexer = LightningIndexer(config)

    def forward(
        self, x_TC: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, context: Context, selection: Selection
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output [T, C], and the lightning indexer's loss (scalar, mean over queries) where the context asks for it."""
        config = self.config
        q_latent_TR = self.q_a_layernorm(self.q_a_proj(x_TC))
        q_THD = self.q_b_proj(q_latent_TR).unflatten(-1, (config.num_attention_heads, -1))
        q_nope_THN, q_rope_THP = q_THD.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        latent_TL, k_rope_TP = self.kv_a_proj_with_mqa(x_TC).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], dim=-1
        )
        kv_TD = torch.cat((self.kv_a_layernorm(latent_TL), rotate_interleaved(k_rope_TP, cos, sin)), dim=-1)

        # absorb the key up-projection into the query, and later the value up-projection into the output
        up_HXL = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        key_up_HNL, value_up_HVL = up_HXL.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        q_absorbed_THL = torch.einsum("thn,hnl->thl", q_nope_THN, key_up_HNL)
        q_THD = torch.cat((q_absorbed_THL, rotate_interleaved(q_rope_THP, cos, sin)), dim=-1)

        index = None
        if selection == "sparse" or context.indexer_loss != "none":
            index = self.indexer(x_TC, q_latent_TR, cos, sin)
        kv_SD, index_k_SD = context.add_keys(self.layer, kv_TD, index[1] if index else None)
        if index is not None and index_k_SD is not None:
            index = (index[0], index_k_SD, index[2])
        out_THL, loss = self._attend(q_THD, kv_SD, index, context, selection)
        out_THV = torch.einsum("thl,hvl->thv", out_THL, value_up_HVL)
        return self.o_proj(out_THV.flatten(1)), loss

    def _attend(
        self,
        q_THD: torch.Tensor,
        kv_SD: torch.Tensor,
        index: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
        context: Context,
        selection: Selection,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention output in the latent space [T, H, L], and the indexer's loss.

        `index`: the lightning indexer's queries, keys (all rows) and head weights; None where nothing needs them.
        """
        value_dim, loss = self.config.kv_lora_rank, None
        if selection == "dense" and isinstance(context, PackedContext):
            if index and context.indexer_loss == "dense":
                rows = (context.key_start_T, context.key_end_T)
                loss_sum, queries = indexer_loss_dense(*index, q_THD.detach(), kv_SD.detach(), *rows, self.scale)
                loss = loss_sum / queries
            out = dense_attention(q_THD, kv_SD, context.key_start_T, context.key_end_T, self.scale, value_dim)[0]
            return out, loss
        if context.kept_selections is not None and selection == "sparse":
            rows_TK = context.rows_of(context.kept_selections[self.layer])
        elif index and selection == "sparse":
            index_q_THD, index_k_SD, weight_TH = (tensor.detach() for tensor in index)
            rows_TK = context.select(self.layer, index_q_THD, index_k_SD, weight_TH, self.config.index_topk)
        else:
            rows_TK = context.fixed_rows(selection, self.layer, self.config.index_topk)
        if context.record_selections:
            context.selections.append(rows_TK)
        if index and context.indexer_loss == "sparse":
            target_TK = attention_target(q_THD.detach(), kv_SD.detach(), rows_TK, self.scale)
            loss_sum, queries = indexer_loss_sparse(*index, rows_TK, target_TK)
            loss = loss_sum / queries
        return sparse_attention(q_THD, kv_SD, rows_TK, self.scale, value_dim)[0], loss
