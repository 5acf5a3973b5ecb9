"""Device layouts of weights, made from a checkpoint's tensors: blobs of 64 outputs x 64 depths (`src/formats.cuh`).

`fields` brings a format's tensors to codes and numbers, row by row; `pack` writes blobs of them. Outputs are padded to
64 and depths to 512 with zeros.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.aqlm import Aqlm
from ..formats.base import Format, FormatError, Shape, Tensors, padded
from ..formats.fp8 import Fp8
from ..formats.gguf import Gguf
from ..formats.int4 import Int4
from ..formats.int8 import Int8
from ..formats.mxfp4 import Mxfp4, scales_of
from ..formats.nf4 import BLOCK, Nf4, block_scales, split_high
from ..formats.nibbles import split
from ..formats.spqr import Spqr
from . import ggml, spqr
from .blobs import BLOB, LAYOUTS, UNIT, Layout, bytes_of

_PIECE = 2048  # outputs packed at once: temporaries stay small beside the matrix


@dataclass(frozen=True)
class Extension:
    """Columns of x that come once more behind the last, times a power of two each."""

    columns: Tensor
    """int32 [n]"""
    factors: Tensor
    """float32 [n]"""


@dataclass(frozen=True)
class Fields:
    """One matrix as codes and numbers, each tensor with one entry an output."""

    layout: Layout
    width: int
    rows: Tensors
    """codes uint8 or bfloat16 [out, in]; scale, zero, middle [out, in / group]; row_scale float32 [out].

    outliers bfloat16 [out, in], no number where there is none.
    """
    codebooks: Tensor | None = None
    extension: Extension | None = None
    columns: Tensor | None = None
    """int32 [in]: which column of x a column of the matrix multiplies, where that is not its own."""

    @property
    def depth(self) -> int:
        """Columns with those of the extension, padded."""
        return padded(self.width + (len(self.extension.columns) if self.extension else 0), UNIT)

    @property
    def outputs(self) -> int:
        return len(self.rows["codes"])


@dataclass(frozen=True)
class Weights:
    """One matrix on the device."""

    layout: Layout
    shape: Shape
    blobs: Tensor
    """uint8 [ceil(out / 64), padded in / 64, bytes]"""
    scale: Tensor | None = None
    """float32 [padded out]"""
    codebooks: Tensor | None = None
    extension: Extension | None = None
    columns: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.blobs, self.scale, self.codebooks) if t is not None)

    @property
    def depth_blobs(self) -> int:
        return self.blobs.shape[1]

    @property
    def plain(self) -> bool:
        """They read activations in the order of their columns."""
        return not self.layout.reordered and self.columns is None


def pack(fields: Fields) -> Weights:
    """Fields in the device's layout, on the fields' device."""
    layout, outputs, device = fields.layout, fields.outputs, fields.rows["codes"].device
    if "outliers" in fields.rows:
        layout = spqr.fitted(fields.rows["outliers"])
    blobs = torch.empty(padded(outputs, BLOB) // BLOB, fields.depth // BLOB, layout.bytes,
                        dtype=torch.uint8, device=device)  # fmt: skip
    for start in range(0, outputs, _PIECE):
        piece = {name: t[start : start + _PIECE] for name, t in fields.rows.items() if name != "row_scale"}
        parts = layout.write(_padded_fields(piece, fields.depth, layout))
        first = start // BLOB
        blobs[first : first + len(parts[0])] = torch.cat([bytes_of(part) for part in parts], -1)
    scale = fields.rows.get("row_scale")
    if scale is not None:
        scale = F.pad(scale.float(), (0, -len(scale) % BLOB))
    shape = (outputs, fields.width)
    return Weights(layout, shape, blobs, scale, fields.codebooks, fields.extension, fields.columns)


def stacked(parts: Sequence[Weights]) -> Weights:
    """Matrices of one shape and layout one after another, as experts: what a product of grouped rows reads."""
    first = parts[0]
    for part in parts:
        if part.layout is not first.layout or part.shape != first.shape:
            raise FormatError("experts have different layouts or shapes.")
        if part.codebooks is not None or part.extension is not None or part.columns is not None:
            raise FormatError("experts with codebooks, outlier columns or columns in an order of their own stay apart.")
    scales = [part.scale for part in parts if part.scale is not None]
    return Weights(
        first.layout, first.shape, torch.cat([part.blobs for part in parts]), torch.cat(scales) if scales else None
    )


def dense_rows(weights: Weights, which: Tensor) -> Tensor:
    """Rows [n] of weights in bfloat16: [n, in]."""
    blobs = weights.blobs.view(torch.bfloat16).view(*weights.blobs.shape[:2], 4, 4, 8, 4, 2, 2, 2)  # j warp g t c h e
    warp, half, g = which % BLOB // 16, which % 16 // 8, which % 8
    rows = blobs[which // BLOB, :, :, warp, g, :, :, half]  # n, blob, j, t, c, e
    return rows.transpose(3, 4).flatten(1)[:, : weights.shape[1]]


def interleave(gate: Fields, up: Fields) -> Fields:
    """Outputs by sixteens, 8 of `gate` and the same 8 of `up`, each padded to a multiple of 32 with zeros."""
    if gate.layout is not up.layout or gate.width != up.width or gate.outputs != up.outputs:
        raise FormatError("gate and up have different layouts or shapes.")
    if gate.extension or up.extension:
        raise FormatError("gate and up with outlier columns of their own are two products.")
    if not _same(gate.columns, up.columns):
        raise FormatError("gate and up with columns in orders of their own are two products.")

    def both(name: str) -> Tensor:
        pair = torch.stack((gate.rows[name], up.rows[name]))
        pair = F.pad(pair.flatten(2) if pair.dim() > 2 else pair[..., None], (0, 0, 0, -gate.outputs % 32))
        return pair.unflatten(1, (-1, 8)).transpose(0, 1).flatten(0, 2).view(-1, *gate.rows[name].shape[1:])

    rows = {name: both(name) for name in gate.rows}
    return Fields(gate.layout, gate.width, rows, gate.codebooks, columns=gate.columns)


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second or (first is not None and second is not None and torch.equal(first, second))


def beside(parts: Sequence[Fields]) -> Fields:
    """Outputs of several matrices of one width, one after another: each but the last fills whole blobs."""
    first = parts[0]
    if any(part.layout is not first.layout or part.width != first.width for part in parts):
        raise FormatError("matrices have different layouts or widths.")
    if any(part.codebooks is not None or part.extension for part in parts):
        raise FormatError("matrices with codebooks or outlier columns of their own are products of their own.")
    if not all(_same(first.columns, part.columns) for part in parts):
        raise FormatError("matrices with columns in orders of their own are products of their own.")
    if any(part.outputs % BLOB for part in parts[:-1]):
        raise FormatError(f"a matrix of {[part.outputs for part in parts]} outputs ends within a blob.")
    rows = {name: torch.cat([part.rows[name] for part in parts]) for name in first.rows}
    return Fields(first.layout, first.width, rows, columns=first.columns)


def _padded_fields(rows: Tensors, depth: int, layout: Layout) -> Tensors:
    """Whole blobs."""
    out = {}
    for name, t in rows.items():
        unit = {"codes": 1, "outliers": 1}.get(name, layout.group)
        if layout.reordered:
            t = F.pad(t, (0, 0, 0, depth // 8 - t.shape[1]))
            out[name] = F.pad(t, (0, 0, 0, 0, 0, -len(t) % BLOB))
        else:
            empty = spqr.NONE if name == "outliers" else 0
            out[name] = F.pad(t, (0, depth // unit - t.shape[1], 0, -len(t) % BLOB), value=empty)
    return out


def layout_of(format: Format, shape: Shape, group: int = BLOB) -> Layout:
    """How a matrix of a format is stored; group: of int4 weights. What no layout holds as it is becomes bfloat16."""
    match format:
        case Int4():
            name = "Int4Group32" if group == 32 else "Int4"
        case Nf4():
            name = "Nf4" if shape[1] % BLOCK == 0 else "Nf4Across"
        case Mxfp4():
            name = "Mxfp4"
        case Fp8():
            name = "Fp8"
        case Spqr():
            return spqr.layout(0)
        case Int8():
            name = "Int8"
        case Gguf():
            name = ggml.LAYOUT_OF.get(format.name, "Bf16")
        case Aqlm(codebooks=2, bits=8) | Aqlm(codebooks=1, bits=16):
            name = f"Aqlm{format.codebooks}x{format.bits}"
        case _:
            name = "Bf16"
    return LAYOUTS[name]


def nbytes(format: Format, shape: Shape) -> int:
    """Bytes of a matrix on the device, without outlier columns."""
    layout = layout_of(format, shape, format.group or BLOB if isinstance(format, Int4) else BLOB)
    blobs = padded(shape[0], BLOB) // BLOB * (padded(shape[1], UNIT) // BLOB)
    books = 2 * 8 * (format.codebooks << format.bits) if isinstance(format, Aqlm) and layout.reordered else 0
    return blobs * layout.bytes + (4 * padded(shape[0], BLOB) if layout.scaled else 0) + books


def fields(format: Format, tensors: Mapping[str, Tensor], shape: Shape) -> Fields:
    """A checkpoint's tensors, checked."""
    layout = layout_of(format, shape, _group(tensors) if isinstance(format, Int4) else BLOB)
    match format:
        case Int4():
            return _int4(layout, tensors)
        case Nf4():
            return _nf4(layout, tensors, shape)
        case Mxfp4():
            codes = split(tensors["blocks"]).flatten(1)
            return Fields(layout, shape[1], {"codes": codes, "scale": scales_of(tensors)})
        case Fp8():
            scale = format.spread(tensors["weight_scale_inv"], shape, BLOB)
            return Fields(layout, shape[1], {"codes": tensors["weight"].view(torch.uint8), "scale": scale})
        case Spqr() if (taken := spqr.taken_apart(format, tensors, shape)) is not None:
            return Fields(layout, shape[1], taken[0], columns=taken[1])
        case Int8():
            return _int8(layout, tensors, shape)
        case Gguf() if format.name in ggml.LAYOUT_OF:
            rows = ggml.rows(format.name, tensors["blocks"].view(shape[0], -1, format.size))
            return Fields(layout, shape[1], {name: t.flatten(1) for name, t in rows.items()})
        case Aqlm() if layout.reordered:
            books = tensors["codebooks"][:, :, 0].bfloat16().contiguous()
            # A code of 16 bits is two bytes, the lower first, as are those of two codebooks.
            rows = {"codes": tensors["codes"].view(torch.uint8), "row_scale": tensors["scales"].float().flatten()}
            return Fields(layout, shape[1], rows, books)
    return dense(format.dequantize(tensors, shape, torch.float32))


def dense(weight: Tensor) -> Fields:
    """A matrix [out, in] of floating point."""
    return Fields(LAYOUTS["Bf16"], weight.shape[1], {"codes": weight.bfloat16()})


def _group(tensors: Mapping[str, Tensor]) -> int:
    """Depths that share a scale in int4 weights."""
    return 2 * tensors["codes"].shape[1] // tensors["scales"].shape[1]


def _nf4(layout: Layout, tensors: Mapping[str, Tensor], shape: Shape) -> Fields:
    codes = split_high(tensors["weight"][:, 0])[: shape[0] * shape[1]].view(shape)
    scale = block_scales(tensors, torch.float32)
    if layout.name == "Nf4":
        return Fields(layout, shape[1], {"codes": codes, "scale": scale.view(shape[0], -1)})
    # Where the blobs of a row begin in the one long row of blocks.
    begin = torch.arange(shape[0], device=codes.device)[:, None] * shape[1]
    begin = begin + torch.arange(0, shape[1], BLOB, device=codes.device)
    first = begin // BLOCK
    numbers = {"scale": scale[first], "second": scale[(first + 1).clamp(max=len(scale) - 1)]}
    return Fields(layout, shape[1], {"codes": codes, **numbers, "border": BLOCK - begin % BLOCK})


def _int4(layout: Layout, tensors: Mapping[str, Tensor]) -> Fields:
    codes, scale, zero = split(tensors["codes"]), tensors["scales"], tensors["zeros"]
    if (group := _group(tensors)) > BLOB:
        scale, zero = (t.repeat_interleave(group // BLOB, 1) for t in (scale, zero))
    return Fields(layout, codes.shape[1], {"codes": codes, "scale": scale, "zero": zero})


def _int8(layout: Layout, tensors: Mapping[str, Tensor], shape: Shape) -> Fields:
    """Outlier columns are two columns of codes each, behind all others: v = scale · 2^e · (first + second / 256)."""
    codes, scale, columns = tensors["codes"], tensors["scales"], tensors["outliers"]
    if not len(columns):
        return Fields(layout, shape[1], {"codes": codes.view(torch.uint8), "row_scale": scale})
    # A row that is all outliers has no scale of its own.
    least = tensors["values"].float().abs().amax(1) / 2**14
    empty = scale == 0
    scale = torch.where(empty, least.clamp(min=torch.finfo(torch.float32).tiny), scale)
    shares = tensors["values"].double() / scale.double()[:, None]
    exponent = max(0, math.ceil(math.log2(max(float(shares.abs().max()), 1e-30) / 127)))
    shares = shares / 2.0**exponent
    first = shares.round().clamp(-127, 127)
    second = ((shares - first) * 256).round().clamp(-128, 127)
    codes = torch.cat((codes, first.to(torch.int8), second.to(torch.int8)), 1)
    factors = torch.tensor([2.0**exponent, 2.0 ** (exponent - 8)], device=codes.device).repeat_interleave(len(columns))
    extension = Extension(columns.int().repeat(2), factors)
    return Fields(layout, shape[1], {"codes": codes.view(torch.uint8), "row_scale": scale}, None, extension)
