"""What a linear sees: the second moment of its inputs over the calibration text."""

from __future__ import annotations

import torch
from torch import Tensor


class Covariance:
    """E[x xᵀ] of rows x [in], uncentered, summed in float32 on `device`."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.rows = 0
        self._sum = torch.zeros(width, width, device=device)

    def add(self, x: Tensor) -> None:
        """x: [..., in], of any number of rows."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self._sum += x.T @ x
        self.rows += len(x)

    def mean(self) -> Tensor:
        """[in, in]; zero where nothing was added."""
        return self._sum / max(1, self.rows)


def relative_error(weight: Tensor, dense: Tensor, covariance: Tensor) -> float:
    """‖(W − Ŵ) x‖ / ‖W x‖ in the root mean square over the inputs; 0 for a linear that saw nothing."""
    wrong, whole = (_energy(matrix, covariance) for matrix in (weight - dense, weight))
    return (wrong / whole) ** 0.5 if whole > 0 else 0.0


def _energy(matrix: Tensor, covariance: Tensor) -> float:
    return float(((matrix @ covariance) * matrix).sum(dtype=torch.float64).clamp(min=0))
