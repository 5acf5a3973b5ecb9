"""Rounding column by column, each column's error made good by the columns that are still to come.

GPTQ (Frantar et al. 2023, arXiv:2210.17323), algorithm 1, in an order that keeps groups whole: groups by the energy of
their inputs, then columns within a group. So a group's grid is fitted to the columns as they are when their turn comes,
and the stored layout needs no permutation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Of the mean diagonal, added to the diagonal: directions without inputs must not cost nothing.
_DAMPING = 0.01


class Grid(Protocol):
    """The values that a linear's weights may take, fitted group by group."""

    def fit(self, columns: Tensor, values: Tensor) -> None:
        """Settle the grid of a group: which columns it has, [size], and their values [out, size]."""

    def round(self, column: int, values: Tensor) -> Tensor:
        """Values [out] of a column whose group is settled -> what is stored for them, [out]."""


@dataclass(frozen=True)
class Feedback:
    """The order of the columns [in] in groups of `size`, and upper triangular U in it with Uᵀ U = (H + λ)⁻¹."""

    size: int
    order: Tensor
    factor: Tensor

    @classmethod
    def against(cls, covariance: Tensor, size: int) -> Feedback:
        """covariance: H = E[x xᵀ], [in, in], whose width divides by the group's `size`."""
        order = _order(covariance.diagonal(), size)
        return cls(size, order, _inverse_factor(covariance[order][:, order]))

    @property
    def cost(self) -> Tensor:
        """What a squared error of each column costs when its turn has come, [in]."""
        return (self.factor.diagonal() ** -2)[self.order.argsort()]

    def run(self, weight: Tensor, grid: Grid) -> Tensor:
        """Round `weight` [out, in] on `grid` -> the rounded weights; later columns make good earlier errors."""
        left, columns = weight[:, self.order], self.order.tolist()
        errors = left.new_empty(len(left), self.size)
        for start in range(0, len(self.order), self.size):
            end = start + self.size
            grid.fit(self.order[start:end], left[:, start:end])
            for at, column in enumerate(range(start, end)):
                rounded = grid.round(columns[column], left[:, column])
                errors[:, at] = (left[:, column] - rounded) / self.factor[column, column]
                left[:, column] = rounded
                left[:, column + 1 : end].addr_(errors[:, at], self.factor[column, column + 1 : end], alpha=-1)
            left[:, end:].addmm_(errors, self.factor[start:end, end:], alpha=-1)
        return left[:, self.order.argsort()]


def _order(energy: Tensor, size: int) -> Tensor:
    """Columns, those of strong inputs first: they find most columns left to make good what they lose."""
    groups = energy.view(-1, size)
    first = groups.sum(1).argsort(descending=True, stable=True)
    within = groups.argsort(dim=1, descending=True, stable=True)
    return (within + size * torch.arange(len(groups), device=energy.device)[:, None])[first].flatten()


def _inverse_factor(covariance: Tensor) -> Tensor:
    damped = covariance.double()
    diagonal = damped.diagonal()
    mean = float(diagonal.mean())
    diagonal += _DAMPING * mean if mean > 0 else 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
