"""The C product with packed weights, for every format."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..backend import Linear
from ..formats.aqlm import Aqlm
from ..formats.base import Format, QuantizedTensor
from ..formats.fp8 import Fp8
from ..formats.gguf import SMALL, Gguf
from ..formats.int4 import Int4
from ..formats.int8 import Int8
from ..formats.mxfp4 import Mxfp4
from ..formats.nf4 import BLOCK, LEVELS, Nf4
from ..formats.spqr import Spqr, permutation
from .layout import INTERLEAVED, pack, take_rows, unpack
from .library import Library
from .linear import biases

# In the order of kind_t in quantized.h.
KINDS = (
    "fp16", "int8", "int4", "nf4", "aqlm", "spqr", "q4_0", "q4_1", "q8_0", "q4_k", "q5_k", "q6_k", "q5_0", "q5_1",
    "q2_k", "q3_k", "iq4_nl", "iq4_xs",
)  # fmt: skip


def readable(format: Format) -> bool:
    """Whether the C products read a format; others are made dense."""
    return not isinstance(format, (Fp8, Mxfp4))


class _Weights(ctypes.Structure):
    """weights_t of quantized.h; decode.c and integer.h say what each format puts into it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "out", "in", "row_bytes", "group", "count")),
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "extra", "more")),
    ]


class QuantizedLinear(Linear):
    """y = x Wᵀ + b with W in any format.

    int8, int4, nf4 and the small GGUF types multiply in integers (integer.h); others are decoded to bfloat16, bit for
    bit as `PackedLinear` has it with the dequantized weights.
    """

    def __init__(self, library: Library, matrix: QuantizedTensor, bias: Tensor | None = None) -> None:
        """Raises FormatError where the tensors do not fit, ValueError for a bias that does not."""
        super().__init__()
        self.format, shape = matrix.format, matrix.shape
        self.out_features, self.in_features = shape
        shown, whole_bias = biases(bias, shape[0])
        packed = pack(matrix)
        for name, tensor in packed.items():
            self.register_buffer(f"packed_{name}", tensor)
        self.register_buffer("bias", shown)
        self.adapter, self._library = None, library
        kind, fields = _fields(self.format, packed)
        self._kept = [whole_bias, *(value for value in fields.values() if isinstance(value, Tensor))]
        values = {name: v.data_ptr() if isinstance(v, Tensor) else v for name, v in fields.items()}
        codes = fields["codes"]
        assert isinstance(codes, Tensor)
        laid = codes.dim() == 4
        values["row_bytes"] = codes.nbytes // (len(codes) * INTERLEAVED if laid else len(codes))
        self._struct = _Weights(**{"kind": KINDS.index(kind), "out": shape[0], "in": shape[1], **values})
        self._weights = ctypes.addressof(self._struct), whole_bias.data_ptr()
        self._columns = permutation(packed, shape[1]) if isinstance(self.format, Spqr) else None
        self._multiply = library.integer if laid else library.quantized

    @property
    def packed(self) -> dict[str, Tensor]:
        """The weights in the kernels' layout."""
        return {name.removeprefix("packed_"): t for name, t in self.named_buffers() if name.startswith("packed_")}

    @property
    def nbytes(self) -> int:
        """See `Linear`."""
        return sum(tensor.nbytes for tensor in self.packed.values())

    def forward(self, x: Tensor) -> Tensor:
        """See `Linear`. Raises MemoryError."""
        width = self.in_features
        if x.shape[-1] != width:
            raise ValueError(f"rows of {x.shape[-1]} values, expected {width}")
        if x.dtype != torch.float32:
            return self.forward(x.float()).to(x.dtype)
        columns = self._columns
        given = x.contiguous() if columns is None else x[..., columns].contiguous()
        y = torch.empty(*x.shape[:-1], self.out_features)
        rows = x.numel() // width
        if self._multiply(y.data_ptr(), given.data_ptr(), *self._weights, rows, self._library.threads):
            raise MemoryError(f"no memory to lay out {rows} rows of {width} values")
        return y if self.adapter is None else y + self.adapter(x)

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """See `Linear`."""
        return unpack(self.format, self.packed, (self.out_features, self.in_features)).dense(dtype)

    def rows(self, which: Tensor) -> Tensor:
        """See `Linear`."""
        taken = take_rows(self.format, self.packed, (self.out_features, self.in_features), which)
        return taken.dense()

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.name}"

    def _apply(self, function: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """What is packed is never converted or moved: it belongs to its backend."""
        return self


def _fields(format: Format, packed: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor | int]]:
    named: dict[str, Tensor | int]
    match format:
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
            if "codes" in packed:
                return format.name, {"codes": packed["codes"], "scales": packed["scales"], "group": SMALL}
            return format.name, {"codes": packed["blocks"]}
    return "fp16", {"codes": packed["weight"]}


def _depth(codes: Tensor) -> int:
    """Bytes of codes a row."""
    return codes.shape[1] * codes.shape[3]
