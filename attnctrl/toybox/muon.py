"""Muon in float32, batched over matrices of equal shape.

Orthogonalised momentum (K. Jordan et al., 2024) for the blocks' weight matrices. `torch.optim.Muon` runs its
Newton-Schulz iteration matrix by matrix in bfloat16, which most CPUs emulate; here equal shapes are stacked into one
batched product.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Quintic Newton-Schulz iteration on [N, R, C]: singular values move towards 1 (within about 0.7 to 1.2)."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for matrices and convolutions (as [out, in * kernel] matrices).

    `lr`: spectral norm of an update of a square matrix.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.01, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(tuple(parameter.flatten(1).shape), []).append(parameter)
            for shape, parameters in shapes.items():
                updates = []
                for parameter in parameters:
                    gradient: Any = parameter.grad
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    buffer = state["momentum"]
                    buffer.lerp_(gradient, 1 - group["momentum"])
                    updates.append(torch.lerp(gradient, buffer, group["momentum"]).flatten(1))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)
