"""Muon: momentum whose matrix update is orthogonalised by Newton-Schulz iterations (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon/), scaled to the size of AdamW's updates (arXiv 2502.16982, section 2.2).

`torch.optim.Muon` takes two-dimensional parameters one by one; this one also takes stacks of matrices (the routed
experts) and iterates on all matrices of one shape at once, which is what its time goes into for a small model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from components.runtime.ranks import Ranks

# Quintic iteration of the reference implementation: singular values of anything reach 0.7 to 1.2 in five steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_RMS_OF_ADAMW = 0.2


@torch.no_grad()
def orthogonalise(matrices_BMN: torch.Tensor) -> torch.Tensor:
    """U V^T, nearly, of each matrix U S V^T. Shape suffixes: B matrices of M rows and N columns."""
    a, b, c = _COEFFICIENTS
    wide = matrices_BMN.shape[-2] <= matrices_BMN.shape[-1]
    x_BMN = matrices_BMN if wide else matrices_BMN.mT
    x_BMN = x_BMN / (x_BMN.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ITERATIONS):
        gram_BMM = x_BMN @ x_BMN.mT
        x_BMN = torch.baddbmm(x_BMN, torch.baddbmm(gram_BMM, gram_BMM, gram_BMM, beta=b, alpha=c), x_BMN, beta=a)
    return x_BMN if wide else x_BMN.mT


class Muon(torch.optim.Optimizer):
    """For parameters of two or three dimensions (a stack of matrices). `lr` is comparable with AdamW's."""

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ranks: Ranks | None = None,
    ) -> None:
        """`ranks`: data-parallel processes with the same gradients; each orthogonalises its share of the matrices."""
        self.ranks = ranks or Ranks()
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"Muon takes matrices and stacks of them, got a shape of {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        stacks: list[tuple[dict[str, Any], list[torch.Tensor]]] = []  # parameters of one group and one shape
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape[-2:], []).append(parameter)
            stacks += [(group, parameters) for parameters in by_shape.values()]
        updates = []
        for number, (group, parameters) in enumerate(stacks):
            direction_BMN = torch.cat([self._direction(parameter, group["momentum"]) for parameter in parameters])
            updates.append(self._share(number, direction_BMN))
        self.ranks.sum(updates)
        for (group, parameters), update_BMN in zip(stacks, updates, strict=True):
            scale = _RMS_OF_ADAMW * max(update_BMN.shape[-2:]) ** 0.5
            sizes = [parameter[..., 0, 0].numel() for parameter in parameters]
            for parameter, update in zip(parameters, update_BMN.split(sizes), strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)

    def _direction(self, parameter: torch.Tensor, momentum: float) -> torch.Tensor:
        """Nesterov momentum of the gradient, [B, M, N]."""
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        assert parameter.grad is not None
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum).reshape(-1, *parameter.shape[-2:])

    def _share(self, number: int, direction_BMN: torch.Tensor) -> torch.Tensor:
        """This rank's matrices of stack `number` orthogonalised, zeros for the others': the ranks' sum is the whole."""
        size = self.ranks.size
        first = (self.ranks.rank + number) % size  # so that not every stack of three is shared two to one
        update_BMN = torch.zeros_like(direction_BMN)
        if first < len(direction_BMN):
            update_BMN[first::size] = orthogonalise(direction_BMN[first::size])
        return update_BMN
