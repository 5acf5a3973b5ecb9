"""SpQR's grid: 3-bit weights, whose scales and zeros are 3-bit themselves, and outliers apart.

Dettmers et al. 2023, arXiv:2306.03078, algorithm 1. A tile is 16 rows by a group of 16 columns; the scales of its rows
share a scale and a zero of second order, and so do its zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 8
SIZE = 16  # columns of a group, and rows of a tile
_LEAST = 2.0**-14


class Statistic:
    """3-bit codes for one number of each row and group; value = (code − zero) · scale.

    codes [out, groups]; scales and zeros of second order [out / 16, groups], float16.
    """

    def __init__(self, rows: int, groups: int, device: torch.device) -> None:
        self.codes = torch.zeros(rows, groups, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(rows // SIZE, groups, dtype=torch.float16, device=device)
        self.zeros = torch.zeros(rows // SIZE, groups, dtype=torch.float16, device=device)

    def span(self, group: int, wanted: Tensor) -> Tensor:
        """Settle the second order so that the levels span `wanted` [out] -> a row's levels [out, 8]."""
        tiles = wanted.view(-1, SIZE)
        low, high = tiles.amin(1), tiles.amax(1)
        scales = ((high - low) / (LEVELS - 1)).clamp(min=_LEAST).half()
        zeros = (-low / scales.float()).half()
        self.scales[:, group], self.zeros[:, group] = scales, zeros
        codes = torch.arange(LEVELS, device=wanted.device)
        levels = (codes - zeros.float()[:, None]) * scales.float()[:, None]
        return levels.repeat_interleave(SIZE, 0)


class SpqrGrid:
    """w = (code − zero) · scale, plus for outliers what is left, in float16.

    codes [out, in]; residuals [out, in], zero but for outliers; `outliers` tells which are.
    """

    def __init__(self, weight: Tensor, cost: Tensor, share: float) -> None:
        """weight: [out, in], both of which divide by 16; cost: [in], of a squared error.

        An outlier costs more than a threshold: what its group gains without it, for the worst `share` of the weights.
        """
        rows, columns = weight.shape
        self._cost = cost
        self.codes = torch.zeros(rows, columns, dtype=torch.uint8, device=weight.device)
        self.outliers = torch.zeros(rows, columns, dtype=torch.bool, device=weight.device)
        self.residuals = torch.zeros(rows, columns, dtype=torch.float16, device=weight.device)
        self.scale = Statistic(rows, columns // SIZE, weight.device)
        self.zero = Statistic(rows, columns // SIZE, weight.device)
        self._row_scale, self._row_zero = weight.new_zeros(rows), weight.new_zeros(rows)
        self._threshold = _threshold(weight, cost, share)

    def fit(self, columns: Tensor, values: Tensor) -> None:
        """See Grid.fit. Likely outliers are left out; the rest takes the best pair of what the tile's levels offer."""
        group, cost = int(columns[0]) // SIZE, self._cost[columns]
        kept = leave_one_out(values, cost) <= self._threshold
        scale, zero = _range(values, kept)
        scales = self.scale.span(group, scale)
        nearest = (scales - scale[:, None]).abs().argmin(1, keepdim=True)
        zeros = self.zero.span(group, zero * scale / scales.gather(1, nearest)[:, 0].clamp(min=_LEAST))
        pairs = scales.repeat_interleave(LEVELS, 1), zeros.repeat(1, LEVELS)
        best = _errors(values, *pairs, cost * kept).argmin(1, keepdim=True)
        self.scale.codes[:, group] = (best[:, 0] // LEVELS).to(torch.uint8)
        self.zero.codes[:, group] = (best[:, 0] % LEVELS).to(torch.uint8)
        self._row_scale, self._row_zero = (values.gather(1, best)[:, 0] for values in pairs)

    def round(self, column: int, values: Tensor) -> Tensor:
        """See Grid.round."""
        codes = _nearest(values, self._row_scale, self._row_zero)
        dense = (codes - self._row_zero) * self._row_scale
        outliers = (values - dense) ** 2 * self._cost[column] > self._threshold
        residuals = torch.where(outliers, values - dense, 0).half()
        self.codes[:, column] = codes.to(torch.uint8)
        self.outliers[:, column] = outliers
        self.residuals[:, column] = residuals
        return dense + residuals.float()


def leave_one_out(values: Tensor, cost: Tensor) -> Tensor:
    """How much a group's weighted error falls where one weight is kept apart: [n, 16], cost [n or 1, 16] -> [n, 16]."""
    everything = torch.ones_like(values, dtype=torch.bool)
    whole = _error(values, everything, cost)
    without = [_error(values, everything & (torch.arange(SIZE, device=values.device) != i), cost) for i in range(SIZE)]
    return whole[:, None] - torch.stack(without, 1)


def _threshold(weight: Tensor, cost: Tensor, share: float) -> float:
    gains = torch.cat(
        [
            leave_one_out(values, cost[group * SIZE : (group + 1) * SIZE])
            for group, values in enumerate(weight.split(SIZE, 1))
        ]
    ).flatten()
    count = max(1, round(share * len(gains)))
    return float(gains.topk(count).values[-1])


def _error(values: Tensor, kept: Tensor, cost: Tensor) -> Tensor:
    """Weighted squared error of what is kept, on a grid over its range: [n]."""
    scale, zero = (x[:, None] for x in _range(values, kept))
    return (((_nearest(values, scale, zero) - zero) * scale - values) ** 2 * cost * kept).sum(1)


def _range(values: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero [n] of the grid over what is kept of values [n, 16]."""
    low = values.masked_fill(~kept, torch.inf).amin(1)
    high = values.masked_fill(~kept, -torch.inf).amax(1)
    low, high = low.where(low <= high, 0), high.where(low <= high, 0)
    scale = ((high - low) / (LEVELS - 1)).clamp(min=_LEAST)
    return scale, -low / scale


def _errors(values: Tensor, scales: Tensor, zeros: Tensor, cost: Tensor) -> Tensor:
    """values [out, 16], grids [out, tried], cost [out, 16] -> weighted squared errors [out, tried]."""
    scales, zeros, values = scales[:, :, None], zeros[:, :, None], values[:, None]
    rounded = (_nearest(values, scales, zeros) - zeros) * scales
    errors = ((rounded - values) ** 2 * cost[:, None]).sum(2)
    return errors.masked_fill(scales[:, :, 0] <= 0, torch.inf)  # rounding may leave a level that is none


def _nearest(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (values / scale + zero).round().clamp(0, LEVELS - 1)
