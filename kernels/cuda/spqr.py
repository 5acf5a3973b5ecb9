"""SpQR on a card: blobs of 3-bit codes with lists of outliers behind them (`Spqr` of `src/formats.cuh`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.base import Shape, Tensors, padded
from ..formats.spqr import BITS, TILE, Spqr, permutation, split_outliers, tile_numbers
from .blobs import BLOB, Layout, fragments, numbers, two

NONE = torch.nan  # where a dense matrix of outliers has none
_STRIPE = 8  # outputs whose outliers of a blob are counted: a warp owns two such stripes
_MOST = 127  # outliers of a stripe, so that a byte counts those of a warp
_MIDDLE = 4  # of the codes: what they are counted from
_UNIT = 16  # entries of a list are padded to a multiple of
_FIXED = 2720  # bytes of a blob before its entries
_WORD = 5  # registers whose codes fill a word: three bits each, of both elements


def taken_apart(format: Spqr, tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Tensors, Tensor | None] | None:
    """Rows as `Fields` has them, and the order of columns; None where lists cannot hold all outliers.

    An outlier and the weight that it corrects are one number.
    """
    out, width = shape
    words = format.tiles(tensors, shape)
    mask, statistics = (1 << BITS) - 1, tile_numbers(words).float()[..., None]
    s_s, z_s, s_z, z_z = statistics.unbind(-2)
    scale = s_s * ((words & mask).float() - s_z)
    zero = z_s * ((words >> BITS & mask).float() - z_z)
    places = torch.arange(2, TILE + 2, device=words.device) * BITS
    codes = (words[..., None] >> places & mask).to(torch.uint8)

    def rows(t: Tensor) -> Tensor:
        return t.transpose(1, 2).flatten(2).flatten(0, 1)[:out]

    columns, values = split_outliers(tensors["col_vals"])
    which = torch.arange(out, device=words.device).repeat_interleave(tensors["row_offsets"].long().diff())
    found = {"codes": rows(codes)[:, :width], "scale": rows(scale), "middle": rows(scale * (_MIDDLE - zero))}
    sums = torch.zeros(shape, dtype=torch.float32, device=words.device)
    sums.index_put_((which, columns), values.float(), accumulate=True)
    group = columns // TILE
    weights = found["scale"][which, group] * (found["codes"][which, columns] - rows(zero)[which, group])
    outliers = torch.full(shape, NONE, dtype=torch.bfloat16, device=words.device)
    outliers[which, columns] = (weights + sums[which, columns]).bfloat16()
    if _counts(outliers, _STRIPE).max() > _MOST:
        return None
    order = permutation(tensors, width)
    return found | {"outliers": outliers}, None if order is None else order.int()


def fitted(outliers: Tensor) -> Layout:
    """The layout whose lists hold these outliers [out, in]."""
    return layout(padded(int(_counts(outliers, BLOB).max()), _UNIT))


def _counts(outliers: Tensor, rows: int) -> Tensor:
    """How many each stripe of a blob has, so many rows high."""
    there = F.pad(~outliers.isnan(), (0, -outliers.shape[1] % BLOB, 0, -len(outliers) % rows))
    return there.unflatten(1, (-1, BLOB)).unflatten(0, (-1, rows)).sum((1, 3))


@functools.cache
def layout(entries: int) -> Layout:
    """With room for so many outliers in each blob."""
    name = f"Spqr<{entries}>"
    return Layout(name, _FIXED + 4 * entries, TILE, functools.partial(_write, entries), heavy=True)


def _write(entries: int, rows: Tensors) -> list[Tensor]:
    words = _three_bits(rows["codes"])
    both = two(numbers(rows["scale"], 4), numbers(rows["middle"], 4))  # .., group, pair, h, 2
    planes = both.unflatten(2, (2, 2)).permute(0, 1, 2, 4, 3, 5, 6)  # .., plane, pair, group, h, 2
    return [words[..., :2], words[..., 2], planes, *_lists(rows["outliers"], entries)]


def _three_bits(codes: Tensor) -> Tensor:
    """int32 [.., thread 128, 3]: registers 5 w to 5 w + 4 in word w; of the last, bit b is the highest of word b."""
    v = fragments(codes).flatten(5, 7).flatten(2, 4).int()  # .., thread, register, e
    words = torch.zeros(*v.shape[:-2], 3, dtype=torch.int32, device=v.device)
    for e in range(2):
        for i in range(3 * _WORD):
            words[..., i // _WORD] |= v[..., i, e] << (3 * (i % _WORD) + 16 * e)
        for bit in range(3):
            words[..., bit] |= (v[..., 15, e] >> bit & 1) << (15 + 16 * e)
    return words


def _lists(outliers: Tensor, entries: int) -> list[Tensor]:
    """Where each warp's list begins, in bytes, int32 [.., 4]; where each lane's part does, uint8 [.., 4, 36]; the list.

    An entry, int32, is a bfloat16 and above it the register and, times 16, the element that it replaces.
    """
    values = fragments(outliers.bfloat16()).flatten(5, 7).flatten(2, 4).flatten(3)  # .., thread, 2 · register + e
    there = ~values.isnan()
    before = there.sum(-1).cumsum(-1).unflatten(-1, (4, 32))  # .., warp, lane: with that lane's own
    bases = F.pad(before[..., :-1, -1], (1, 0))
    starts = F.pad(before - bases[..., None], (1, 3))
    place = there.flatten(2).cumsum(-1) - 1
    lists = torch.zeros(*values.shape[:2], max(entries, 1), dtype=torch.int32, device=values.device)
    ob, kb, at = there.flatten(2).nonzero(as_tuple=True)
    which = at % 32
    bits = values.flatten(2)[ob, kb, at].view(torch.int16).int() & 0xFFFF
    lists[ob, kb, place[ob, kb, at]] = bits | ((which // 2 | which % 2 << 4) << 16).int()
    return [4 * bases.int(), starts.to(torch.uint8), lists[..., :entries]]
