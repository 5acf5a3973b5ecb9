"""How a peer holds its weights: dense, as the checkpoint stores them, or quantized while they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...kernels.backend import Backend
from ...kernels.formats.base import Format
from ...kernels.formats.registry import FORMATS
from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.layout import CheckpointError
from .quantized_checkpoint import storage_of

NONE = "none"
# What can be made of any weights in one pass over them.
AT_LOAD = ("int8", "int4", "nf4")
_DENSE = {torch.float32: FORMATS["fp32"], torch.bfloat16: FORMATS["bf16"]}
TORCH_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class WeightPrecision:
    """`keep`: matrices stay in the format in which they are stored; else `format` is made of the linears in blocks.

    dtype: float32 or bfloat16, of whatever stays dense.
    """

    dtype: torch.dtype = torch.float32
    keep: bool = False
    format: Format | None = None
    quant: str = NONE

    @property
    def product_dtype(self) -> torch.dtype:
        """What the products of blocks round their factors to."""
        return self.dtype if self.quant == NONE else torch.bfloat16

    @property
    def dtype_name(self) -> str:
        return next(name for name, dtype in TORCH_DTYPES.items() if dtype == self.dtype)

    def numerics(self, backend: Backend) -> str:
        """Who computes the same bits with the same weights says the same."""
        quant = "" if self.quant == NONE else f"{self.quant}/"
        return f"{quant}{self.dtype_name}/{backend.arithmetic(self.product_dtype)}"


DENSE = WeightPrecision()


def precision_of(checkpoint: Checkpoint, quant: str, dtype: str | None = None) -> WeightPrecision:
    """`--quant` and `--dtype`; dense weights beside quantized ones are bfloat16 unless told. Raises CheckpointError."""
    stored = storage_of(checkpoint).quant
    kind = TORCH_DTYPES[dtype or ("float32" if quant == NONE else "bf16")]
    if quant == NONE:
        return WeightPrecision(kind)
    if quant == stored:
        return WeightPrecision(kind, keep=True, quant=quant)
    if quant in AT_LOAD:
        return WeightPrecision(kind, format=FORMATS[quant], quant=quant)
    ways = ", ".join((NONE, *AT_LOAD, *({stored} - {NONE, *AT_LOAD})))
    raise CheckpointError(f"{checkpoint.name} does not store {quant} weights: choose --quant {ways}.")


def dense_name(backend: Backend) -> str:
    """Of the dtype that a backend's dense weights have unless told."""
    return next(name for name, dtype in TORCH_DTYPES.items() if dtype == backend.dense_dtypes[0])


def choose_precision(
    checkpoint: Checkpoint, dtype: str | None, blocks: int | None, free: int, backend: Backend
) -> WeightPrecision:
    """What a peer holds where `--quant` does not say: as stored where the kernels are as fast, else as fine as fits.

    blocks: how many it must hold, all by default; free: bytes.
    """
    stored = storage_of(checkpoint).quant
    if stored != NONE and backend.native and dtype is None:
        return precision_of(checkpoint, stored)
    dense = precision_of(checkpoint, NONE, dtype or dense_name(backend))
    ways = [dense, *(precision_of(checkpoint, quant, dtype) for quant in ("int8", "int4"))]
    wanted = blocks or checkpoint.n_blocks
    return next((way for way in ways if fitting_blocks(checkpoint, way, free, backend) >= wanted), ways[-1])


def fitting_blocks(checkpoint: Checkpoint, precision: WeightPrecision, free: int, backend: Backend) -> int:
    """Blocks whose weights fit `free` bytes beside embedding and head."""
    shared = {name for names in checkpoint.shared_tensors().values() for name in names}
    rest = free - held_bytes(checkpoint, precision, shared, backend, inside=False)
    names = (checkpoint.block_tensors(block) for block in range(checkpoint.n_blocks))
    block = max(held_bytes(checkpoint, precision, tensors, backend, inside=True) for tensors in names)
    return max(0, min(checkpoint.n_blocks, int(rest // block)))


def span_bytes(checkpoint: Checkpoint, precision: WeightPrecision, blocks: range, backend: Backend) -> int:
    """Bytes of the weights of a span, with embedding and head where it has them."""
    parts = checkpoint.span_tensors(blocks.start, blocks.stop)
    around = {name for part, names in parts.items() if not part.isdecimal() for name in names}
    inside = [name for part, names in parts.items() if part.isdecimal() for name in names]
    return sum(held_bytes(checkpoint, precision, names, backend, inside=names is inside) for names in (inside, around))


def held_bytes(
    checkpoint: Checkpoint, precision: WeightPrecision, names: Iterable[str], backend: Backend, *, inside: bool
) -> int:
    """Bytes that stored tensors take once they are held; `inside` blocks linears are quantized."""
    storage = storage_of(checkpoint)
    total = 0
    for name in storage.names(names):
        shape = storage.shape(checkpoint, name)
        if precision.keep and name in storage.matrices:
            format, stored = storage.matrices[name].format, storage.nbytes(checkpoint, name)
            held = 0 if format is None or len(shape) != 2 else backend.nbytes(format, (shape[0], shape[1]))
            total += max(stored, held)
        elif len(shape) == 2 and inside:
            format = precision.format or _DENSE[precision.dtype]
            total += backend.nbytes(format, (shape[0], shape[1]))
        else:
            total += math.prod(shape) * (precision.dtype.itemsize if len(shape) > 1 else 4)
    return total
