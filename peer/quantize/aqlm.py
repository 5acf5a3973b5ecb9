"""AQLM: additive codebooks fitted to what the layer sees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.formats.aqlm import GROUP, Aqlm
from .additive import Additive, fit_codebooks, fit_scales
from .beam import search_codes
from .covariance import relative_error

_ROUNDS = 12
# A round that gains less, relatively, is the last.
_GAIN = 0.005
_STEPS = 30
_WIDTH = 8
# Of the mean diagonal: directions without inputs must not cost nothing.
_DAMPING = 0.01


class AqlmMethod:
    """2 codebooks of 8 bits for groups of 8: 2 bits a weight, and 8 KiB of codebooks a linear. See Method."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._format = Aqlm()

    def config(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """See Method."""
        return {
            "quant_method": "aqlm",
            "nbits_per_codebook": self._format.bits,
            "num_codebooks": self._format.codebooks,
            "in_group_size": GROUP,
            "out_group_size": 1,
            "linear_weights_not_to_quantize": [name for name, shape in shapes.items() if len(shape) == 2],
        }

    def takes(self, shape: torch.Size) -> bool:
        """See Method."""
        return shape[1] % GROUP == 0

    def quantize(self, weight: Tensor, covariance: Tensor) -> AqlmParts:
        """See Method."""
        mean = float(covariance.diagonal().mean())
        damped = covariance + (_DAMPING * mean if mean > 0 else 1.0) * torch.eye(len(covariance), device=weight.device)
        noise = torch.Generator(weight.device).manual_seed(self._seed)
        parts = Additive.start(weight, self._format.codebooks, 1 << self._format.bits, GROUP, noise)
        error = float("inf")
        for _ in range(_ROUNDS):
            fit_scales(parts, weight, damped)
            fit_codebooks(parts, weight, damped, _STEPS)
            search_codes(parts, weight, damped, _WIDTH)
            before, error = error, relative_error(weight, parts.dense(), damped)
            if error > (1 - _GAIN) * before:
                break
        fit_codebooks(parts, weight, damped, _STEPS)
        return AqlmParts(parts, self._format)


class AqlmParts:
    """See Parts. Codebooks and scales are continuous."""

    def __init__(self, additive: Additive, format: Aqlm) -> None:
        self._additive, self._format = additive, format
        self.settle()

    def continuous(self) -> list[Tensor]:
        """See Parts."""
        return [self._additive.codebooks, self._additive.scales]

    def settle(self) -> None:
        """See Parts."""
        self._additive.as_stored()

    def dense(self) -> Tensor:
        """See Parts."""
        return self._additive.dense()

    def tensors(self) -> dict[str, Tensor]:
        """See Parts."""
        parts = self._additive
        wrap = 1 << self._format.bits
        signed = torch.where(parts.codes >= wrap // 2, parts.codes - wrap, parts.codes)
        return {
            "codebooks": parts.codebooks[:, :, None].half(),
            "codes": signed.to(self._format.code_dtype),
            "scales": parts.scales[:, None, None, None].half(),
        }
