"""Muon: momentum whose matrix update is orthogonalised by Newton-Schulz iterations (Jordan et al., 2024,
https://kellerjordan.github.io/posts/muon/), scaled to the size of AdamW's updates (arXiv 2502.16982, section 2.2).

`torch.optim.Muon` takes two-dimensional parameters one by one; this one also takes stacks of matrices (the routed
experts) and iterates on all matrices of one shape at once, which is what its time goes into for a small model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

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
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() not in (2, 3):
                    raise ValueError(f"Muon takes matrices and stacks of them, got a shape of {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape[-2:], []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameters: list[torch.Tensor], rate: float, momentum: float, decay: float) -> None:
        """One step of parameters whose matrices have one shape."""
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            assert parameter.grad is not None
            state["momentum"].lerp_(parameter.grad, 1 - momentum)
            directions.append(parameter.grad.lerp(state["momentum"], momentum).reshape(-1, *parameter.shape[-2:]))
        rows, columns = parameters[0].shape[-2:]
        scale = _RMS_OF_ADAMW * max(rows, columns) ** 0.5
        updates = orthogonalise(torch.cat(directions)).split([direction.shape[0] for direction in directions])
        for parameter, update in zip(parameters, updates, strict=True):
            parameter.mul_(1 - rate * decay).add_(update.view_as(parameter), alpha=-rate * scale)
