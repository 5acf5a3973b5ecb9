"""int4 by error feedback: GPTQ on groups of 64 with a scale and a zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.formats.int4 import assemble
from .gptq import Feedback
from .int4_grid import Int4Grid

GROUP = 64


class Int4Method:
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


class Int4Parts:
    """See Parts. Scales are continuous."""

    def __init__(self, grid: Int4Grid) -> None:
        self._codes, self._zeros = grid.codes.unflatten(1, (-1, GROUP)), grid.zeros
        self._scales = grid.scales.float()

    def continuous(self) -> list[Tensor]:
        """See Parts."""
        return [self._scales]

    def settle(self) -> None:
        """See Parts."""
        self._scales = self._scales.half().float()

    def dense(self) -> Tensor:
        """See Parts."""
        return ((self._codes.float() - self._zeros[..., None]) * self._scales[..., None]).flatten(1)

    def tensors(self) -> dict[str, Tensor]:
        """See Parts."""
        return assemble(self._codes, self._scales, self._zeros)
