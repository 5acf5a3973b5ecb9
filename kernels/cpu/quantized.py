"""The C product with packed weights, for every format that it decodes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..formats.aqlm import Aqlm
from ..formats.base import Format, Shape
from ..formats.dense import Dense
from ..formats.gguf import SMALL, Gguf
from ..formats.int4 import Int4
from ..formats.int8 import Int8
from ..formats.nf4 import BLOCK, LEVELS, Nf4
from ..formats.spqr import Spqr, permutation
from . import build as native
from .interleave import LANE

if TYPE_CHECKING:
    from ..quantized import QuantizedLinear

_ARGUMENTS = (*[ctypes.c_void_p] * 4, *[ctypes.c_long] * 2)
# In the order of kind_t in quantized.h.
KINDS = ("fp16", "int8", "int4", "nf4", "aqlm", "spqr", "q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k")


class _Weights(ctypes.Structure):
    """weights_t of quantized.h; decode.c and integer.h say what each format puts into it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "out", "in", "row_bytes", "group", "count")),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "extra", "more")),
    ]


class NativeWeights:
    """What C reads of one layer and which function; it keeps the tensors alive whose addresses it holds."""

    def __init__(self, format: Format, packed: Mapping[str, Tensor], shape: Shape, bias: Tensor) -> None:
        kind, fields = _fields(format, packed)
        self._kept = [bias, *(value for value in fields.values() if isinstance(value, Tensor))]
        values = {name: v.data_ptr() if isinstance(v, Tensor) else v for name, v in fields.items()}
        codes = fields["codes"]
        assert isinstance(codes, Tensor)
        laned = codes.dim() == 4
        values["row_bytes"] = codes.nbytes // (len(codes) * LANE if laned else len(codes))
        self._struct = _Weights(**{"kind": KINDS.index(kind), "out": shape[0], "in": shape[1], **values})
        self.address, self.bias = ctypes.addressof(self._struct), bias.data_ptr()
        self.columns = permutation(packed, shape[1]) if isinstance(format, Spqr) and packed["in_perm"].numel() else None
        function = native.function("petal_integer" if laned else "petal_quantized", *_ARGUMENTS, returns=ctypes.c_int)
        assert function is not None
        self.function = function


def decodes(format: Format) -> bool:
    """Whether there is C code for the format."""
    if isinstance(format, Dense):
        return format.dtype == torch.float16
    return True


def _fields(format: Format, packed: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor | int]]:
    named: dict[str, Tensor | int]
    match format:
        case Dense():
            return "fp16", {"codes": packed["weight"]}
        case Int8():
            outliers = packed["outliers"]
            named = {"codes": packed["codes"], "scales": packed["scales"], "zeros": outliers}
            return "int8", named | {"extra": packed["values"], "count": len(outliers), "group": _depth(packed["codes"])}
        case Int4():
            groups, codes = packed["scales"].shape[1], packed["codes"]
            named = {"codes": codes, "scales": packed["scales"], "zeros": packed["zeros"]}
            return "int4", named | {"count": groups, "group": 2 * _depth(codes) // groups}
        case Nf4():
            offset = packed["offset"] if format.nested else torch.zeros(1)
            named = {"codes": packed["weight"], "scales": packed["absmax"], "group": BLOCK}
            named["more"] = torch.cat((offset, torch.tensor(LEVELS)))
            nested = {"zeros": packed["nested_absmax"], "extra": packed["nested_quant_map"]} if format.nested else {}
            return "nf4", named | nested
        case Aqlm():
            named = {"codes": packed["codes"], "scales": packed["scales"], "extra": packed["codebooks"]}
            return "aqlm", named | {"group": format.bits, "count": format.codebooks}
        case Spqr():
            named = {"codes": packed["dense_weights"], "scales": packed["row_offsets"]}
            return "spqr", named | {"zeros": packed["col_vals"], "extra": packed["numbers"]}
        case Gguf():
            if format.laned:
                return format.name, {"codes": packed["codes"], "scales": packed["scales"], "group": SMALL}
            return format.name, {"codes": packed["blocks"]}
    raise AssertionError(f"no C code for {format.name}")


def multiply(layer: QuantizedLinear, x: Tensor) -> Tensor:
    """x [..., in] -> [..., out] float32. Raises MemoryError."""
    weights = layer.native()
    if x.dtype != torch.float32:
        x = x.float()
    x = x.contiguous() if weights.columns is None else x[..., weights.columns].contiguous()
    y = torch.empty(*x.shape[:-1], layer.out_features)
    rows = x.numel() // layer.in_features
    if weights.function(y.data_ptr(), x.data_ptr(), weights.address, weights.bias, rows, native.threads()):
        raise MemoryError(f"no memory to lay out {rows} rows of {layer.in_features} values")
    return y


def _depth(codes: Tensor) -> int:
    """Bytes of codes a row."""
    return codes.shape[1] * codes.shape[3]
