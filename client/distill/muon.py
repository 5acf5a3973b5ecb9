"""Muon (Jordan et al., 2024): momentum whose singular values are made equal, for matrices between hidden states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Newton-Schulz coefficients of the reference implementation: steep near zero, fast into [0.7, 1.2].
_A, _B, _C = 3.4445, -4.7750, 2.0315


class Muon(torch.optim.Optimizer):
    """Rates mean what they mean to AdamW: updates are scaled to its usual size (Moonlight, arXiv 2502.16982).

    Matrices of one shape are updated together, as one small product at a time would leave a GPU idle.
    """

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update from the gradients; every parameter has one."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for matrices in shapes.values():
                self._update(matrices, group)

    def _update(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        grads = [matrix.grad for matrix in matrices if matrix.grad is not None]
        moments = [self.state[matrix].setdefault("moment", torch.zeros_like(matrix)) for matrix in matrices]
        torch._foreach_lerp_(moments, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, moments, group["momentum"])
        scale = 0.2 * max(matrices[0].shape) ** 0.5
        steps = orthogonal(torch.stack(list(ahead))) * (-group["lr"] * scale)
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(matrices, list(steps.to(matrices[0].dtype).unbind()))


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[n, rows, columns] -> U Vᵀ of each singular value decomposition, roughly, in bfloat16."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = (matrices if wide else matrices.mT).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = _A * x + (_B * square + _C * square @ square) @ x
    return x if wide else x.mT
