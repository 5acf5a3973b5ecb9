"""Tensors of any format for tests, as a checkpoint would hold them."""

from __future__ import annotations

import torch
from petal.kernels.formats.aqlm import Aqlm
from petal.kernels.formats.base import Format, Tensors
from petal.kernels.formats.gguf import Gguf
from petal.kernels.formats.int4 import ROW, Int4
from petal.kernels.formats.registry import FORMATS
from petal.kernels.formats.spqr import Spqr, join_outliers, join_words
from torch import Generator, Tensor

VARIANTS = {**FORMATS, "int4-32": Int4(32), "int4-row": Int4(ROW), "int4-192": Int4(192), "aqlm-3x5": Aqlm(3, 5)}
# Those whose products are sums of integers.
INTEGER = [name for name in VARIANTS if name.startswith(("int", "nf4")) or name in ("q4_0", "q4_1", "q8_0")]


def random_tensors(format: Format, shape: tuple[int, int], seed: int = 0) -> Tensors:
    """A random matrix of about unit columns: quantized, or drawn as codes where that needs calibration."""
    noise = torch.Generator().manual_seed(seed)
    if isinstance(format, Aqlm):
        return _aqlm(format, shape, noise)
    if isinstance(format, Spqr):
        return _spqr(shape, noise)
    if isinstance(format, Gguf) and format.encode is None:
        return {"blocks": _k_blocks(format, shape, noise)}
    return format.quantize(torch.randn(shape, generator=noise) / shape[1] ** 0.5)


def _aqlm(format: Aqlm, shape: tuple[int, int], noise: Generator) -> Tensors:
    out, width = shape
    books = torch.randn(format.codebooks, 1 << format.bits, 1, 8, generator=noise) / width**0.5
    codes = torch.randint(1 << format.bits, (out, width // 8, format.codebooks), generator=noise)
    scales = 1 + torch.rand(out, 1, 1, 1, generator=noise)
    return {"codebooks": books.half(), "codes": codes.to(format.code_dtype), "scales": scales.half()}


def _spqr(shape: tuple[int, int], noise: Generator) -> Tensors:
    out, width = shape
    rows, columns = -(-out // 16), -(-width // 16)
    scales, zeros = torch.randint(8, (2, rows, columns, 16), generator=noise)
    codes = torch.randint(8, (rows, columns, 16, 16), generator=noise)
    numbers = torch.rand(rows, columns, 4, generator=noise) + 0.1
    numbers[..., 0] /= 4 * width**0.5
    numbers[..., 1] = numbers[..., 1] / 10 + 0.1
    numbers[..., 3] = -20  # zeros in the middle of the codes
    chosen = torch.rand(shape, generator=noise) < 0.01
    places = chosen.nonzero()
    values = torch.randn(len(places), generator=noise) / width**0.5
    return {
        "dense_weights": join_words(scales, zeros, codes, numbers.half()),
        "row_offsets": torch.cat((torch.zeros(1), chosen.sum(1).cumsum(0))).int(),
        "col_vals": join_outliers(places[:, 1], values),
    }


def _k_blocks(format: Gguf, shape: tuple[int, int], noise: Generator) -> Tensor:
    count = shape[0] * shape[1] // format.block
    blocks = torch.randint(256, (count, format.size), generator=noise, dtype=torch.uint8)
    size = {"q5_0": 10, "q5_1": 10, "iq4_nl": 70, "q2_k": 30, "q3_k": 50, "iq4_xs": 1500}.get(format.name, 800)
    for at in format.halves:
        scale = (0.5 + torch.rand(len(blocks), 1, generator=noise)) / (size * shape[1] ** 0.5)
        if (format.name, at) == ("q5_1", 2):
            scale = -16 * blocks[:, :2].contiguous().view(torch.half).float()  # weights around zero
        blocks[:, at : at + 2] = scale.half().view(torch.uint8)
    return blocks.view(shape[0], -1)
