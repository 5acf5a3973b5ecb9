"""How the C products read weights: layouts of the same size as a format's own, and the way back.

Integer products (integer.h) read rows interleaved, 16 side by side; what is decoded to bfloat16 (decode.c) stays as
the checkpoint has it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import nibbles
from ..formats.base import Format, QuantizedTensor, Shape, Tensors, padded
from ..formats.gguf import Gguf
from ..formats.int4 import Int4
from ..formats.int8 import Int8
from ..formats.nf4 import BLOCK, Nf4, pair_high, split_high
from ..formats.spqr import TILE, Spqr, tile_numbers

INTERLEAVED = 16  # rows side by side
DEPTH = 4  # codes of a row that stay neighbours
RUN = 64  # depth that the kernels take at once, where groups allow it
MIDDLE = 128  # zero of codes of a byte, which the kernels read without a sign
SIDE_BY_SIDE = ("q4_0", "q4_1", "q8_0")  # types whose codes are whole nibbles or bytes behind their scales
SHARE = 32  # depth whose four-bit codes pair up
PIECE = 64  # strips that are interleaved at a time


def interleaved(format: Format, shape: Shape) -> bool:
    """Whether integer products read it."""
    match format:
        case Int8() | Int4():
            return True
        case Nf4():
            return shape[1] % BLOCK == 0
        case Gguf():
            return format.name in SIDE_BY_SIDE
    return False


def nbytes(format: Format, shape: Shape) -> int:
    """Bytes of a packed matrix; where outliers count, without them."""
    if isinstance(format, Spqr):  # the tiles' numbers apart
        return format.nbytes(shape) + 8 * padded(shape[0], TILE) * padded(shape[1], TILE) // TILE**2
    if not interleaved(format, shape):
        return format.nbytes(shape)
    out = padded(shape[0], INTERLEAVED)
    if isinstance(format, Nf4):  # the scales of its scales have no rows
        row = shape[1] // 2 + shape[1] // BLOCK * (1 if format.nested else 4)
        return format.nbytes(shape) + (out - shape[0]) * row
    return format.nbytes((out, padded(shape[1], RUN) if isinstance(format, Int8) else shape[1]))


def pack(matrix: QuantizedTensor) -> Tensors:
    """A matrix as the kernels read it. Raises FormatError."""
    format, shape = matrix.format, matrix.shape
    format.check(matrix.tensors, shape)
    tensors = {name: tensor.contiguous() for name, tensor in matrix.tensors.items()}
    match format:
        case Int8():
            codes = F.pad(tensors["codes"].view(torch.uint8) ^ MIDDLE, (0, -shape[1] % RUN), value=MIDDLE)
            scales, values = interleave(tensors["scales"][:, None]), interleave(tensors["values"])
            return tensors | {"codes": interleave(codes, DEPTH), "scales": scales, "values": values}
        case Int4():
            codes = interleave(pair(nibbles.split(tensors["codes"])), DEPTH)
            return {"codes": codes, "scales": interleave(tensors["scales"]), "zeros": interleave(tensors["zeros"])}
        case Nf4() if interleaved(format, shape):
            codes = split_high(tensors["weight"][:, 0]).view(shape)
            absmax = interleave(tensors["absmax"].view(shape[0], -1))
            return tensors | {"weight": interleave(pair(codes), DEPTH), "absmax": absmax}
        case Gguf() if interleaved(format, shape):
            return _pack_blocks(format, tensors["blocks"])
        case Spqr():
            # Words as rows, [padded out, tiles of columns], the way that kernels walk, and the tiles' numbers apart.
            tiles = format.tiles(tensors, shape)
            words = tiles.transpose(1, 2).flatten(0, 1).contiguous()
            return tensors | {"dense_weights": words, "numbers": tile_numbers(tiles).contiguous()}
    return tensors


def _pack_blocks(format: Gguf, blocks: Tensor) -> Tensors:
    """Some rows at a time: an embedding is most of a small model, and is not held a third time meanwhile."""
    head, strips = 2 * len(format.halves), -(-len(blocks) // INTERLEAVED)
    count = blocks.shape[1] // format.size
    codes = blocks.new_empty(strips, count * (format.size - head) // DEPTH, INTERLEAVED, DEPTH)
    scales = blocks.new_empty(strips, count * head // 2, INTERLEAVED, 2)
    for first in range(0, strips, PIECE):
        some = slice(first, first + PIECE)
        rows = blocks[first * INTERLEAVED : (first + PIECE) * INTERLEAVED].view(-1, count, format.size)
        codes[some] = interleave(rows[..., head:].flatten(1) ^ (MIDDLE if format.signed else 0), DEPTH)
        scales[some] = interleave(rows[..., :head].flatten(1), 2)
    return {"codes": codes, "scales": scales}


def unpack(format: Format, packed: Mapping[str, Tensor], shape: Shape) -> QuantizedTensor:
    """What `pack` was given."""
    if interleaved(format, shape):
        every = slice(None)
        return QuantizedTensor(format, _canonical(format, packed, shape, every, shape[0]), shape)
    if isinstance(format, Spqr):
        words = packed["dense_weights"].unflatten(0, (-1, TILE)).transpose(1, 2).flatten()
        rest = {name: tensor for name, tensor in packed.items() if name != "numbers"}
        return QuantizedTensor(format, rest | {"dense_weights": words}, shape)
    return QuantizedTensor(format, packed, shape)


def take_rows(format: Format, packed: Mapping[str, Tensor], shape: Shape, which: Tensor) -> QuantizedTensor:
    """Some rows [n], as the checkpoint has them. Raises FormatError where the format has no rows apart."""
    taken = (len(which), shape[1])
    if interleaved(format, shape) and not isinstance(format, Nf4):
        return QuantizedTensor(format, _canonical(format, packed, shape, which, len(which)), taken)
    return QuantizedTensor(format, format.take_rows(packed, shape, which), taken)


def _canonical(
    format: Format, packed: Mapping[str, Tensor], shape: Shape, which: Tensor | slice, count: int
) -> Tensors:
    """Interleaved tensors in the checkpoint's layout: of the `count` rows `which`, or of all."""

    def rows(name: str) -> Tensor:
        tensor = packed[name]
        if isinstance(which, slice):
            return tensor.transpose(1, 2).flatten(2).flatten(0, 1)[:count]
        return tensor[which // INTERLEAVED, :, which % INTERLEAVED].flatten(1)

    match format:
        case Int8():
            codes = (rows("codes")[:, : shape[1]] ^ MIDDLE).view(torch.int8)
            scales, values = rows("scales")[:, 0], rows("values")
            return {"codes": codes, "scales": scales, "values": values, "outliers": packed["outliers"]}
        case Int4():
            return {"codes": nibbles.pair(split(rows("codes"))), "scales": rows("scales"), "zeros": rows("zeros")}
        case Nf4():
            codes, absmax = split(rows("weight")).flatten(), rows("absmax").flatten()
            return dict(packed) | {"weight": pair_high(codes)[:, None], "absmax": absmax}
        case Gguf():
            head = 2 * len(format.halves)
            codes = (rows("codes") ^ (MIDDLE if format.signed else 0)).unflatten(1, (-1, format.size - head))
            return {"blocks": torch.cat((rows("scales").unflatten(1, (-1, head)), codes), -1).flatten(1)}
    raise AssertionError(f"{format.name} is not interleaved")


def interleave(rows: Tensor, unit: int = 1) -> Tensor:
    """[out, n] -> [⌈out / 16⌉, n / unit, 16, unit], rows past `out` zero."""
    whole = F.pad(rows, (0, 0, 0, -len(rows) % INTERLEAVED))
    return whole.view(len(whole) // INTERLEAVED, INTERLEAVED, rows.shape[1] // unit, unit).transpose(1, 2).contiguous()


def pair(codes: Tensor) -> Tensor:
    """uint8 [..., 32n] below 16 -> [..., 16n]: of each run of 32, depths d and d + 16 share a byte, the first low."""
    low, high = codes.unflatten(-1, (-1, 2, SHARE // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def split(pairs: Tensor) -> Tensor:
    """What `pair` was given."""
    runs = pairs.unflatten(-1, (-1, SHARE // 2))
    return torch.stack((runs & 15, runs >> 4), -2).flatten(-3)
