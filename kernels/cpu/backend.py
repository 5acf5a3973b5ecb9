"""The CPU: C kernels for the best instruction set that it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import activations
from ..backend import Backend, LayerSpec
from ..formats.base import Format, QuantizedTensor, Shape
from ..formats.dense import Dense
from . import layout
from .attention import CpuKVStorage
from .build import Building
from .elementwise import Elementwise
from .library import NO_COMPILER, Library, kernels
from .linear import PackedLinear, panel_nbytes
from .quantized import QuantizedLinear, readable


class NoNativeKernels(RuntimeError):
    """There are none for this processor, and none could be compiled."""


class CpuBackend(Elementwise, Backend):
    """Everything in native code; a row's bits depend on that row and its cache alone, whatever the threads."""

    name = "cpu"
    native = True
    # Host rows are its own, in the stream's dtype.
    decode, encode = staticmethod(activations.decode), staticmethod(activations.encode)

    def __init__(self, building: Building | None = None, arithmetic: str = "") -> None:
        """Of the arithmetic that is named, if one is; `building` hears of a build that is under way.

        Raises NoNativeKernels; NoSuchISA where PETAL_ISA names what cannot be had.
        """
        found = kernels(building, arithmetic)
        if found is None:
            raise NoNativeKernels(f"there are no kernels for this processor: {NO_COMPILER}")
        self.isa, self.library = found.isa, Library(found.path, torch.get_num_threads())
        super().__init__(torch.device("cpu"))

    @property
    def threads(self) -> int:
        """Of the kernels: torch's number when the backend was made, unless somebody chose another."""
        return self.library.threads

    @threads.setter
    def threads(self, count: int) -> None:
        self.library.threads = count

    def linear(
        self, weight: Tensor | QuantizedTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> PackedLinear | QuantizedLinear:
        """See `Backend`."""
        if isinstance(weight, Tensor):
            return PackedLinear(self.library, weight, bias, dtype)
        if _in_panels(weight.format):
            weight.format.check(weight.tensors, weight.shape)
            return PackedLinear(self.library, weight.tensors["weight"], bias, dtype)
        if not readable(weight.format):
            weight.format.check(weight.tensors, weight.shape)
            return PackedLinear(self.library, weight.dense(), bias, torch.bfloat16)
        return QuantizedLinear(self.library, weight, bias)

    def nbytes(self, format: Format, shape: Shape) -> int:
        """See `Backend`."""
        if isinstance(format, Dense) and _in_panels(format):
            return panel_nbytes(format.dtype, shape)
        if not readable(format):
            return panel_nbytes(torch.bfloat16, shape)
        return layout.nbytes(format, shape)

    def kv_storage(
        self, layers: Sequence[LayerSpec], n_pages: int, page_size: int, dtype: torch.dtype = torch.float32
    ) -> CpuKVStorage:
        """See `Backend`."""
        return CpuKVStorage(self.library, layers, n_pages, page_size, dtype)

    def arithmetic(self, dtype: torch.dtype) -> str:
        """See `Backend`."""
        own = self.isa.arithmetic
        return "native" if own == "amx" and dtype != torch.bfloat16 else own

    def in_arithmetic(self, name: str, dtype: torch.dtype) -> CpuBackend | None:
        """See `Backend`."""
        if self.arithmetic(dtype) == name:
            return self
        try:
            other = CpuBackend(arithmetic=name)
        except NoNativeKernels:
            return None
        other.threads = self.threads
        return other if other.arithmetic(dtype) == name else None

    def exactness_obstacle(self, widths: Sequence[int]) -> str:
        """See `Backend`."""
        # torch computes the ends of odd tensors with other code than their bulk.
        odd = [width for width in widths if width % 32]
        return f"the model has layers of width {odd[0]}, no multiple of 32" if odd else ""


def _in_panels(format: Format) -> bool:
    """Whether a format's weights are multiplied as dense ones are."""
    return isinstance(format, Dense) and format.dtype != torch.float16
