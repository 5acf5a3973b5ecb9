"""Groupwise int4 with a scale and a zero: the grid that error feedback rounds on."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 16
# Parts of a group's range that are tried: to cut the extremes makes all other steps finer.
_PARTS = 26
_LEAST_PART = 0.5


class Int4Grid:
    """w = (code − zero) · scale; codes and zeros 0 to 15, scales float16, one of each for `size` columns of a row."""

    def __init__(self, shape: torch.Size, size: int, cost: Tensor) -> None:
        """shape: [out, in], whose width divides by `size`; cost: [in], of a squared error."""
        rows, columns = shape
        self._size, self._cost = size, cost
        self.codes = torch.zeros(rows, columns, dtype=torch.uint8, device=cost.device)
        self.zeros = torch.zeros(rows, columns // size, dtype=torch.uint8, device=cost.device)
        self.scales = torch.zeros(rows, columns // size, dtype=torch.float16, device=cost.device)

    def fit(self, columns: Tensor, values: Tensor) -> None:
        """See Grid.fit: the least weighted error among ranges around the values."""
        low, high = values.amin(1, keepdim=True).clamp(max=0), values.amax(1, keepdim=True).clamp(min=0)
        part = torch.linspace(1.0, _LEAST_PART, _PARTS, device=values.device)
        scales = ((high - low) * part / (LEVELS - 1)).clamp(min=2.0**-14).half().float()
        zeros = (-low * part / scales).round().clamp(0, LEVELS - 1)
        best = _errors(values, scales, zeros, self._cost[columns]).argmin(1, keepdim=True)
        group = int(columns[0]) // self._size
        self.scales[:, group] = scales.gather(1, best)[:, 0].half()
        self.zeros[:, group] = zeros.gather(1, best)[:, 0].to(torch.uint8)

    def round(self, column: int, values: Tensor) -> Tensor:
        """See Grid.round."""
        group = column // self._size
        scale, zero = self.scales[:, group].float(), self.zeros[:, group].float()
        codes = _nearest(values, scale, zero)
        self.codes[:, column] = codes.to(torch.uint8)
        return (codes - zero) * scale


def _errors(values: Tensor, scales: Tensor, zeros: Tensor, cost: Tensor) -> Tensor:
    """values [out, size], grids [out, tried] -> weighted squared errors [out, tried]."""
    scales, zeros, values = scales[:, :, None], zeros[:, :, None], values[:, None]
    rounded = (_nearest(values, scales, zeros) - zeros) * scales
    return (((rounded - values) ** 2) * cost).sum(2)


def _nearest(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (values / scale + zero).round().clamp(0, LEVELS - 1)
