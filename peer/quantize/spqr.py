"""SpQR: error feedback on 3-bit tiles, outliers apart, in the layout of its release."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.formats.spqr import BITS, join_outliers, join_words
from .gptq import Feedback
from .method import Fixed
from .spqr_grid import SIZE, SpqrGrid

# Of the weights, those without which their groups would gain the most; about a third of them stay apart in the end.
_SUSPECTS = 0.03
_NAMES = (".dense_weights", ".row_offsets", ".col_vals", ".in_perm")


class SpqrMethod(Fixed):
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
        return SpqrParts(grid, feedback.run(weight, grid))


@dataclass(frozen=True)
class SpqrParts:
    """See Parts."""

    grid: SpqrGrid
    rounded: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """See Parts."""
        grid = self.grid
        scales, zeros = (_tiled(statistic.codes[..., None])[..., 0] for statistic in (grid.scale, grid.zero))
        numbers = torch.stack((grid.scale.scales, grid.zero.scales, grid.scale.zeros, grid.zero.zeros), -1)
        rows, columns = grid.outliers.nonzero(as_tuple=True)
        counts = torch.bincount(rows, minlength=len(grid.outliers))
        return {
            "dense_weights": join_words(scales, zeros, _tiled(grid.codes.unflatten(1, (-1, SIZE))), numbers),
            "row_offsets": torch.cat((counts.new_zeros(1), counts.cumsum(0))).int(),
            "col_vals": join_outliers(columns, grid.residuals[rows, columns]),
            "in_perm": torch.empty(0, dtype=torch.int32),
        }

    def dense(self) -> Tensor:
        """See Parts."""
        return self.rounded


def _tiled(rows: Tensor) -> Tensor:
    """[out, groups, n] -> [out / 16, groups, 16, n]."""
    return rows.unflatten(0, (-1, SIZE)).transpose(1, 2)
