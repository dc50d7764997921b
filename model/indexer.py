"""The lightning indexer (arXiv 2512.02556, Eq. 1): which past tokens a query attends to.

    I[t, s] = sum_h w[t, h] * ReLU(q[t, h] . k[s])

Its inputs are detached: it learns from the KL to the attention (Eq. 3 and 4) and from nothing else, and the network
does not learn from it. Shape suffixes: T tokens, C hidden size, R query latent, H indexer heads, D indexer head dim.
"""

from __future__ import annotations

import torch
from torch import nn

from model.config import ModelConfig
from model.rope import rotate_half_split


class LightningIndexer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rope_dim = config.index_n_heads, config.index_head_dim, config.qk_rope_head_dim
        self.wq_b = nn.Linear(config.q_lora_rank, self.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.head_dim, bias=False)
        self.k_norm = nn.LayerNorm(self.head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.weight_scale = self.heads**-0.5 * self.head_dim**-0.5

    def forward(
        self, x_TC: torch.Tensor, q_latent_TR: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries [T, H, D], the one shared key [T, D], and head weights [T, H] (fp32, both scales included)."""
        x_TC, q_latent_TR = x_TC.detach(), q_latent_TR.detach()
        q_THD = self.wq_b(q_latent_TR).unflatten(-1, (self.heads, self.head_dim))
        k_TD = self.k_norm(self.wk(x_TC))
        q_THD = self._rotate_front(q_THD, cos, sin)
        k_TD = self._rotate_front(k_TD, cos, sin)
        weight_TH = self.weights_proj(x_TC.to(self.weights_proj.weight.dtype)) * self.weight_scale
        return q_THD, k_TD, weight_TH

    def _rotate_front(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The rotary part stands first in the indexer, last in MLA."""
        return torch.cat((rotate_half_split(x[..., : self.rope_dim], cos, sin), x[..., self.rope_dim :]), dim=-1)
