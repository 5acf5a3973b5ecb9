"""What the ways to quantize have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Parts(Protocol):
    """One linear's quantized weight."""

    def continuous(self) -> list[Tensor]:
        """What may still move once the codes are chosen, float32; `dense` hands gradients on to it."""

    def settle(self) -> None:
        """Round what is continuous to what a checkpoint holds."""

    def dense(self) -> Tensor:
        """The weight that the parts stand for, [out, in] float32."""

    def tensors(self) -> dict[str, Tensor]:
        """As stored, by the names that follow the linear's."""


class Method(Protocol):
    """A way to quantize."""

    def config(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint with tensors of these shapes."""

    def takes(self, shape: torch.Size) -> bool:
        """Whether a weight of this shape, [out, in], has a place in the format."""

    def quantize(self, weight: Tensor, covariance: Tensor) -> Parts:
        """weight: [out, in] float32, covariance of its inputs: [in, in], both on the device that computes."""
