"""What the ways to quantize have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..span_plain import PlainBlock


class Parts(Protocol):
    """One linear's quantized weight."""

    def tensors(self) -> dict[str, Tensor]:
        """As stored, by the names that follow the linear's."""

    def dense(self) -> Tensor:
        """The weight that `tensors` stand for, [out, in] float32."""


AnyParts = TypeVar("AnyParts", bound=Parts)


class Method(Protocol[AnyParts]):
    """A way to quantize."""

    def config(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """The `quantization_config` of a checkpoint with tensors of these shapes."""

    def takes(self, shape: torch.Size) -> bool:
        """Whether a weight of this shape, [out, in], has a place in the format."""

    def quantize(self, weight: Tensor, covariance: Tensor) -> AnyParts:
        """weight: [out, in] float32, covariance of its inputs: [in, in], both on the device that computes."""

    def tune(
        self, block: PlainBlock, parts: Mapping[str, AnyParts], inputs: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        """Adjust in place what is continuous in a block's `parts`, by the linears' paths, and in its norms.

        inputs, targets: [n, length, d], what enters the block behind quantized ones, and what would leave it if no
        block were: what went wrong before is made good as far as a block can. Returns the tensors of the norms that it changed.
        """


class Fixed:
    """A method whose parts are final."""

    def tune(self, block: PlainBlock, parts: Mapping[str, Any], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """See Method."""
        return {}
