"""Feed-forward layers: the dense MLP and the mixture of experts with sigmoid routing (DeepSeek-V3, arXiv 2412.19437).

Expert load is balanced without an auxiliary loss: a bias per expert, used for the choice only, is nudged after each
step (section 2.1.2). Shape suffixes: T tokens, C hidden size, E experts, K experts per token, I expert width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from model.config import ModelConfig


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TC)) * self.up_proj(x_TC))


class Router(nn.Module):
    """Chooses experts by sigmoid score + bias, weighs them by the score alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.e_score_correction_bias: torch.Tensor = nn.Buffer(torch.zeros(config.n_routed_experts))

    def forward(self, x_TC: torch.Tensor, experts_TK: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Expert ids [T, K] (int64) and weights [T, K]. With `experts_TK` given, the choice is kept (Keep Routing)."""
        compute = torch.promote_types(x_TC.dtype, torch.float32)
        score_TE = F.linear(x_TC.to(compute), self.weight.to(compute)).sigmoid()
        if experts_TK is None:
            experts_TK = self._choose(score_TE.detach())
        weight_TK = score_TE.gather(1, experts_TK)
        if self.config.norm_topk_prob:
            weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return experts_TK, weight_TK * self.config.routed_scaling_factor

    def _choose(self, score_TE: torch.Tensor) -> torch.Tensor:
        """Top experts of the best groups; a stable sort gives ties to the lower expert id on every device."""
        choice_TE = score_TE + self.e_score_correction_bias
        groups, kept = self.config.n_group, self.config.topk_group
        if kept < groups:
            by_group = choice_TE.unflatten(-1, (groups, -1))
            group_score = by_group.topk(2, dim=-1).values.sum(dim=-1)
            best = group_score.sort(dim=-1, descending=True, stable=True).indices[:, :kept]
            allowed = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, best, True)
            choice_TE = by_group.masked_fill(~allowed[..., None], float("-inf")).flatten(1)
        order = choice_TE.sort(dim=-1, descending=True, stable=True).indices
        return order[:, : self.config.num_experts_per_tok]


class Experts(nn.Module):
    """All routed experts of a layer. Tokens are sorted by expert, so that each expert is one matrix product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x_TC: torch.Tensor, experts_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        tokens, per_token = experts_TK.shape
        order = experts_TK.flatten().argsort(stable=True)
        counts = torch.bincount(experts_TK.flatten(), minlength=self.gate_up_proj.shape[0]).tolist()
        rows = x_TC[order // per_token]
        outputs = []
        for expert, part in enumerate(rows.split(counts)):
            if part.shape[0]:
                gate, up = F.linear(part, self.gate_up_proj[expert]).chunk(2, dim=-1)
                outputs.append(F.linear(F.silu(gate) * up, self.down_proj[expert]))
        # back to token order, then a sum over the K slots: no scatter-add, hence the same result on every run
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        slots_TKC = torch.cat(outputs)[back].view(tokens, per_token, -1)
        return (slots_TKC * weight_TK[..., None].to(x_TC.dtype)).sum(dim=1)


class MixtureOfExperts(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_TC: torch.Tensor, experts_TK: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [T, C] and the expert ids [T, K] that were used."""
        experts_TK, weight_TK = self.gate(x_TC, experts_TK)
        return self.experts(x_TC, experts_TK, weight_TK) + self.shared_experts(x_TC), experts_TK


def expert_load(router: Router, experts_TK: torch.Tensor) -> torch.Tensor:
    """Tokens that each expert was given, fp32 [E]."""
    return torch.bincount(experts_TK.flatten(), minlength=router.config.n_routed_experts).float()


@torch.no_grad()
def balance(router: Router, load_E: torch.Tensor, speed: float) -> None:
    """Raise the bias of experts with a load (see `expert_load`) below the mean and lower that of others by `speed`."""
    router.e_score_correction_bias.add_(torch.sign(load_E.mean() - load_E), alpha=speed)
