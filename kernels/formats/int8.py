"""Row-wise int8 with outlier columns in 16 bits: LLM.int8()'s decomposition (Dettmers et al., arXiv 2208.07339).

There the outlier columns are those where the activations of the batch at hand are large, so that a row's result
depends on the rows beside it. Here they are fixed when the weights are quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format, FormatError, Shape, Tensors, by_pieces, expect, expect_finite, matrix


@dataclass(frozen=True)
class Int8(Format):
    """w = codes · scales, but `values` in the columns `outliers`, whose codes are zero.

    codes int8 [out, in], scales float32 [out], outliers int32 [n] rising, values bfloat16 [out, n].
    """

    threshold: float = 6.0
    """A column is an outlier where its largest weight exceeds so many times the median column's."""
    most_outliers: float = 0.01
    """Share of the columns that may be outliers; at least one may."""

    @property
    def name(self) -> str:
        return "int8"

    def quantize(self, weight: Tensor) -> Tensors:
        return self.quantize_with(weight, self.find_outliers(weight))

    def find_outliers(self, weight: Tensor) -> Tensor:
        """Columns of weight [out, in] that stand out by their weights: int32 [n], rising."""
        weight = matrix(weight)
        largest = torch.maximum(weight.amax(0), -weight.amin(0))
        most = max(1, int(self.most_outliers * len(largest)))
        top = largest.topk(min(most, len(largest))).indices
        chosen = top[largest[top] > self.threshold * largest.median()]
        return chosen.sort().values.int()

    def quantize_with(self, weight: Tensor, outliers: Tensor) -> Tensors:
        """As `quantize`, with outlier columns [n] that somebody else chose, as calibration does."""
        weight = matrix(weight)
        outliers = outliers.to(weight.device, torch.int32).unique()
        columns = outliers.long()
        if len(outliers) and not 0 <= int(outliers[0]) <= int(outliers[-1]) < weight.shape[1]:
            raise FormatError(f"outlier columns lie in 0 to {weight.shape[1] - 1}.")

        def quantize(rows: Tensor) -> Tensors:
            rest = rows.index_fill(1, columns, 0.0)
            scales = rest.abs().amax(1) / 127
            codes = (rest / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
            return {"codes": codes.to(torch.int8), "scales": scales, "values": rows[:, columns].bfloat16()}

        return by_pieces(weight, quantize) | {"outliers": outliers}

    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        out, width = shape
        n = tensors["outliers"].numel() if "outliers" in tensors else 0
        wanted = {
            "codes": (shape, torch.int8),
            "scales": ((out,), torch.float32),
            "outliers": ((n,), torch.int32),
            "values": ((out, n), torch.bfloat16),
        }
        expect(tensors, wanted, self.name)
        expect_finite(tensors, ("scales", "values"), self.name)
        outliers = tensors["outliers"]
        if n and not (int(outliers[0]) >= 0 and int(outliers[-1]) < width and bool((outliers.diff() > 0).all())):
            raise FormatError(f"outlier columns of int8 weights must rise from 0 to at most {width - 1}.")
        if bool(tensors["codes"][:, outliers.long()].any()):
            raise FormatError("codes of int8 weights must be zero in outlier columns.")

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
        dense = tensors["codes"].to(dtype) * tensors["scales"].to(dtype)[:, None]
        return dense.index_copy(1, tensors["outliers"].long(), tensors["values"].to(dtype))

    def take_rows(self, tensors: Mapping[str, Tensor], shape: Shape, which: Tensor) -> Tensors:
        return {name: t if name == "outliers" else t[which] for name, t in tensors.items()}

    def nbytes(self, shape: Shape) -> int:
        return shape[0] * (shape[1] + 4)
