"""SpQR (Dettmers et al., arXiv 2306.03078) in the layout of its release: 3 bits in tiles of 16 × 16, outliers apart.

An int64 holds 16 neighbours of a row: from the lowest bit on a 3-bit scale and a 3-bit zero, 16 3-bit weights, and 8
bits of the tile's four float16 numbers, of which rows 2i and 2i + 1 of the tile bring byte i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Format, FormatError, Shape, Tensors, expect, expect_finite, padded

BITS, TILE = 3, 16
_MASK = (1 << BITS) - 1
_STATISTICS = BITS * (TILE + 2)  # where the 8 bits of the tile's numbers begin


@dataclass(frozen=True)
class Spqr(Format):
    """w = s · (code - z) + outlier, s = s_s · (scale - s_z), z = z_s · (zero - z_z), the latter four by tile.

    dense_weights int64 [tiles of rows · tiles of columns · 16]; row_offsets int32 [out + 1] and col_vals int32
    [outliers], a float16 residual in the high and its column in the low half; in_perm int32 [0] (or absent) or
    [⌈in / 2⌉], two uint16 each, low half first: stored column k belongs to column in_perm[k].
    """

    @property
    def name(self) -> str:
        return "spqr"

    def quantize(self, weight: Tensor) -> Tensors:
        raise FormatError("spqr weights need calibration: load an SpQR checkpoint, or make one with `petal quantize`.")

    def check(self, tensors: Mapping[str, Tensor], shape: Shape) -> None:
        out, width = shape
        tensors = _with_permutation(tensors)
        outliers = tensors["col_vals"].numel() if "col_vals" in tensors else 0
        permuted = tensors["in_perm"].numel() > 0
        wanted = {
            "dense_weights": ((padded(out, TILE) * padded(width, TILE) // TILE,), torch.int64),
            "row_offsets": ((out + 1,), torch.int32),
            "col_vals": ((outliers,), torch.int32),
            "in_perm": (((width + 1) // 2 if permuted else 0,), torch.int32),
        }
        expect(tensors, wanted, self.name)
        offsets, (columns, values) = tensors["row_offsets"].long(), split_outliers(tensors["col_vals"])
        if int(offsets[0]) or int(offsets[-1]) != outliers or bool((offsets.diff() < 0).any()):
            raise FormatError(f"row_offsets of spqr weights must rise from 0 to {outliers}, the number of outliers.")
        if outliers and int(columns.max()) >= width:
            raise FormatError(f"an outlier of spqr weights is in column {int(columns.max())} of {width}.")
        numbers = {"outliers": values, "statistics": tile_numbers(self.tiles(tensors, shape))}
        expect_finite(numbers, ("outliers", "statistics"), self.name)
        if permuted and _columns(tensors["in_perm"], width).sort().values.tolist() != list(range(width)):
            raise FormatError(f"in_perm of spqr weights must name each of the {width} columns once.")

    def tiles(self, tensors: Mapping[str, Tensor], shape: Shape) -> Tensor:
        """The words of a checkpoint's tensors as [tiles of rows, tiles of columns, 16]."""
        return tensors["dense_weights"].view(-1, padded(shape[1], TILE) // TILE, TILE)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: Shape, dtype: torch.dtype = torch.float64) -> Tensor:
        out, width = shape
        words = self.tiles(tensors, shape)
        s_s, z_s, s_z, z_z = tile_numbers(words).to(dtype)[..., None].unbind(-2)
        scale = s_s * ((words & _MASK).to(dtype) - s_z)
        zero = z_s * ((words >> BITS & _MASK).to(dtype) - z_z)
        places = torch.arange(2, TILE + 2, device=words.device) * BITS
        codes = (words[..., None] >> places & _MASK).to(dtype)
        dense = scale[..., None] * (codes - zero[..., None])
        dense = dense.transpose(1, 2).flatten(2).flatten(0, 1)[:out, :width].contiguous()
        columns, values = split_outliers(tensors["col_vals"])
        counts = tensors["row_offsets"].long().diff()
        rows = torch.arange(out, device=words.device).repeat_interleave(counts)
        dense.index_put_((rows, columns), values.to(dtype), accumulate=True)
        if (order := permutation(tensors, width)) is not None:
            dense = torch.empty_like(dense).index_copy_(1, order, dense)
        return dense

    def take_rows(self, tensors: Mapping[str, Tensor], shape: Shape, which: Tensor) -> Tensors:
        raise FormatError("rows of spqr weights share tiles: an embedding cannot be stored so.")

    def nbytes(self, shape: Shape) -> int:
        tiles = padded(shape[0], TILE) * padded(shape[1], TILE) // TILE**2
        return 8 * TILE * tiles + 4 * (shape[0] + 1)


def _with_permutation(tensors: Mapping[str, Tensor]) -> Tensors:
    none = tensors["row_offsets"].new_zeros(0) if "row_offsets" in tensors else torch.zeros(0)
    return {"in_perm": none, **tensors}


def split_outliers(col_vals: Tensor) -> tuple[Tensor, Tensor]:
    """Columns int64 and values float16 of packed outliers [n]."""
    return col_vals.long() & 0xFFFF, (col_vals >> 16).to(torch.int16).view(torch.float16)


def join_outliers(columns: Tensor, values: Tensor) -> Tensor:
    """What `split_outliers` takes apart."""
    return values.half().view(torch.int16).int() << 16 | columns.int()


def permutation(tensors: Mapping[str, Tensor], width: int) -> Tensor | None:
    """in_perm as int64 [in]; None where stored columns are in their places."""
    pairs = tensors.get("in_perm")
    return None if pairs is None or not pairs.numel() else _columns(pairs, width)


def _columns(pairs: Tensor, width: int) -> Tensor:
    return torch.stack((pairs & 0xFFFF, pairs >> 16 & 0xFFFF), -1).flatten()[:width].long()


def join_words(scales: Tensor, zeros: Tensor, codes: Tensor, numbers: Tensor) -> Tensor:
    """The checkpoint's int64 [n] words of tiles.

    scales, zeros [rows, columns, 16] and codes [rows, columns, 16, 16], below 8, by tile and row in the tile;
    numbers float16 [rows, columns, 4]: s_s, z_s, s_z, z_z.
    """
    words = scales.long() | zeros.long() << BITS
    for place in range(TILE):
        words = words | codes[..., place].long() << BITS * (place + 2)
    quarter = numbers.view(torch.int16).long() & 0xFFFF
    fragments = torch.stack((quarter & 0xFF, quarter >> 8), -1).flatten(-2).repeat_interleave(2, -1)
    return (words | fragments << _STATISTICS).flatten()


def tile_numbers(words: Tensor) -> Tensor:
    """float16 [..., 4] of words [..., 16]: s_s, z_s, s_z, z_z of each tile."""
    fragments = words >> _STATISTICS & 0xFF
    low, high = fragments[..., 0::4], fragments[..., 2::4]
    return (low | high << 8).to(torch.int32).to(torch.int16).view(torch.float16)
