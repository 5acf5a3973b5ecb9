"""SpQR: error feedback on 3-bit tiles, outliers apart, in the layout of its release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.formats.spqr import BITS, join_outliers, join_words
from .gptq import Feedback
from .spqr_grid import SIZE, SpqrGrid, Statistic

# Of the weights, those without which their groups would gain the most; about half of them stay apart in the end.
_SUSPECTS = 0.018
_NAMES = (".dense_weights", ".row_offsets", ".col_vals", ".in_perm")


class SpqrMethod:
    """See Method."""

    def config(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """See Method."""
        lengths = {f"{name}.shape": shape[0] for name, shape in shapes.items() if name.endswith(_NAMES)}
        return {"quant_method": "spqr", "bits": BITS, "beta1": SIZE, "beta2": SIZE, "shapes": lengths}

    def takes(self, shape: torch.Size) -> bool:
        """See Method."""
        return shape[0] % SIZE == 0 and shape[1] % SIZE == 0 and shape[1] < 1 << 16

    def quantize(self, weight: Tensor, covariance: Tensor) -> SpqrParts:
        """See Method."""
        feedback = Feedback.against(covariance, SIZE)
        grid = SpqrGrid(weight, feedback.cost, _SUSPECTS)
        feedback.run(weight, grid)
        return SpqrParts(grid)


class SpqrParts:
    """See Parts. The scales and zeros of second order are continuous, and what outliers add."""

    def __init__(self, grid: SpqrGrid) -> None:
        self._codes = grid.codes.unflatten(1, (-1, SIZE))
        self._scale, self._zero = _Levels(grid.scale), _Levels(grid.zero)
        self.outliers = grid.outliers.nonzero(as_tuple=True)
        self._residuals = grid.residuals[self.outliers].float()

    def continuous(self) -> list[Tensor]:
        """See Parts."""
        return [self._residuals, *self._scale.numbers, *self._zero.numbers]

    def settle(self) -> None:
        """See Parts."""
        self._residuals = self._residuals.half().float()
        self._scale.settle()
        self._zero.settle()

    def dense(self) -> Tensor:
        """See Parts."""
        scale, zero = self._scale.values()[..., None], self._zero.values()[..., None]
        return ((self._codes - zero) * scale).flatten(1).index_put(self.outliers, self._residuals, accumulate=True)

    def tensors(self) -> dict[str, Tensor]:
        """See Parts."""
        codes, scales, zeros = (
            _tiled(part) for part in (self._codes, self._scale.codes[..., None], self._zero.codes[..., None])
        )
        pairs = zip(self._scale.numbers, self._zero.numbers, strict=True)
        numbers = torch.stack([number.half() for pair in pairs for number in pair], -1)
        rows, columns = self.outliers
        counts = torch.bincount(rows, minlength=len(self._codes))
        return {
            "dense_weights": join_words(scales[..., 0], zeros[..., 0], codes, numbers),
            "row_offsets": torch.cat((counts.new_zeros(1), counts.cumsum(0))).int(),
            "col_vals": join_outliers(columns, self._residuals),
            "in_perm": torch.empty(0, dtype=torch.int32),
        }


class _Levels:
    """A Statistic with scales and zeros that may move: codes [out, groups], numbers two of [out / 16, groups]."""

    def __init__(self, statistic: Statistic) -> None:
        self.codes = statistic.codes
        self.numbers = [statistic.scales.float(), statistic.zeros.float()]

    def settle(self) -> None:
        self.numbers = [number.half().float() for number in self.numbers]

    def values(self) -> Tensor:
        """[out, groups]."""
        scales, zeros = (number.repeat_interleave(SIZE, 0) for number in self.numbers)
        return (self.codes - zeros) * scales


def _tiled(rows: Tensor) -> Tensor:
    """[out, groups, n] -> [out / 16, groups, 16, n]."""
    return rows.unflatten(0, (-1, SIZE)).transpose(1, 2)
