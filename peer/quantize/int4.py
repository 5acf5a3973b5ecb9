"""int4 by error feedback: GPTQ on groups of 64 with a scale and a zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.formats.int4 import assemble
from .gptq import Feedback
from .int4_grid import Int4Grid
from .method import Fixed

GROUP = 64


class Int4Method(Fixed):
    """See Method."""

    def config(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """See Method."""
        return {"quant_method": "petal", "format": "int4", "group_size": GROUP}

    def takes(self, shape: torch.Size) -> bool:
        """See Method."""
        return shape[1] % GROUP == 0

    def quantize(self, weight: Tensor, covariance: Tensor) -> Int4Parts:
        """See Method."""
        feedback = Feedback.against(covariance, GROUP)
        grid = Int4Grid(weight.shape, GROUP, feedback.cost)
        feedback.run(weight, grid)
        return Int4Parts(grid)


@dataclass(frozen=True)
class Int4Parts:
    """See Parts."""

    grid: Int4Grid

    def tensors(self) -> dict[str, Tensor]:
        """See Parts."""
        grid = self.grid
        return assemble(grid.codes.unflatten(1, (-1, GROUP)), grid.scales, grid.zeros)

    def dense(self) -> Tensor:
        """See Parts."""
        groups = self.grid.codes.unflatten(1, (-1, GROUP)).float() - self.grid.zeros[..., None].float()
        return (groups * self.grid.scales[..., None].float()).flatten(1)
