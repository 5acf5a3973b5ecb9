"""Matrices that a checkpoint stores in a weight format: several tensors under the name of one dense weight.

Keys are those of the programs that write such checkpoints: llama.cpp (GGUF types), bitsandbytes (NF4, LLM.int8()),
AQLM, SpQR's release, DeepSeek (fp8 in blocks), and `petal quantize` (int4).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.formats import gguf
from ...kernels.formats.aqlm import GROUP, Aqlm
from ...kernels.formats.base import Format, FormatError, QuantizedTensor, Shape
from ...kernels.formats.fp8 import Fp8
from ...kernels.formats.int4 import Int4
from ...kernels.formats.int8 import Int8
from ...kernels.formats.nf4 import BLOCK, LEVELS, NESTED, Nf4
from ...kernels.formats.spqr import TILE, Spqr
from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.gguf_model import GgufCheckpoint
from ...protocol.checkpoint.layout import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


@dataclass(frozen=True)
class StoredMatrix:
    """Where the parts of a matrix are, how they are read, and its shape; rows may count `padded`."""

    parts: tuple[str, ...]
    read: Callable[[Checkpoint], QuantizedTensor]
    shape: Callable[[Checkpoint], tuple[int, ...]]
    padded: bool = False
    format: Format | None = None
    """Where a backend may hold it otherwise than stored."""


@dataclass(frozen=True)
class Storage:
    """What a checkpoint stores in a format of its own: `quant` is what `--quant` calls it, "none" for dense values."""

    quant: str
    matrices: Mapping[str, StoredMatrix]

    def names(self, stored: Iterable[str]) -> list[str]:
        """Stored names, those of a matrix's parts replaced by the name of its dense weight."""
        whole = {part: name for name, matrix in self.matrices.items() for part in matrix.parts}
        return list(dict.fromkeys(whole.get(name, name) for name in stored))

    def nbytes(self, checkpoint: Checkpoint, name: str) -> int:
        matrix = self.matrices.get(name)
        return sum(checkpoint.info(part).nbytes for part in (matrix.parts if matrix else (name,)))

    def shape(self, checkpoint: Checkpoint, name: str) -> tuple[int, ...]:
        """Of a dense weight, by the headers of its parts alone; of NF4 its number of values."""
        matrix = self.matrices.get(name)
        return matrix.shape(checkpoint) if matrix else checkpoint.info(name).shape

    def read(self, checkpoint: Checkpoint, name: str, wanted: Shape) -> QuantizedTensor:
        """One of `matrices`, of which the config wants a shape. Raises CheckpointError."""
        matrix = self.matrices[name]
        try:
            found = matrix.read(checkpoint)
            if matrix.padded and found.shape[0] == wanted[0] and found.shape[1] >= wanted[1]:
                found = replace(found, shape=wanted)
            if found.shape != wanted:
                raise FormatError(f"it has shape {list(found.shape)}, the config asks for {list(wanted)}.")
            found.format.check(found.tensors, wanted)
            return found
        except FormatError as error:
            raise CheckpointError(f"{checkpoint.name}: {name}: {error}") from error


def storage_of(checkpoint: Checkpoint) -> Storage:
    """How the checkpoint stores its matrices, by its config and names. Raises CheckpointError."""
    config = checkpoint.config.get("quantization_config")
    if isinstance(checkpoint, GgufCheckpoint):
        return _gguf(checkpoint)
    if not isinstance(config, dict):
        return Storage("none", {})
    method = config.get("quant_method")
    if method == "petal":
        method = config.get("format")
    makers = {"bitsandbytes": _bitsandbytes, "aqlm": _aqlm, "spqr": _spqr, "int4": _int4, "fp8": _fp8}
    if method not in makers:
        raise CheckpointError(
            f"{checkpoint.name}: its weights are quantized by {str(method)[:40]!r}: {', '.join(makers)} can be read."
        )
    return makers[method](checkpoint, config)


def _gguf(checkpoint: GgufCheckpoint) -> Storage:
    def matrix(name: str, kind: gguf.Gguf) -> StoredMatrix:
        return StoredMatrix((name,), lambda c: _read_gguf(c, name, kind), lambda c: c.info(name).shape, format=kind)

    kinds = {name: gguf.TYPES.get(info.dtype.lower()) for name, info in checkpoint.tensors.items()}
    matrices = {
        name: matrix(name, kind) for name, kind in kinds.items() if kind and len(checkpoint.info(name).shape) == 2
    }
    return Storage("gguf" if matrices else "none", matrices)


def _read_gguf(checkpoint: Checkpoint, name: str, kind: gguf.Gguf) -> QuantizedTensor:
    stored = checkpoint.packed(name)
    blocks = torch.from_numpy(np.array(stored))
    checkpoint.forget(stored)
    rows, width = checkpoint.info(name).shape
    return QuantizedTensor(kind, {"blocks": blocks}, (rows, width))


def _tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """A stored tensor of any type, copied. Raises CheckpointError."""
    info = checkpoint.info(name)
    if info.dtype not in _DTYPES:
        raise CheckpointError(f"{checkpoint.name}: {name} has type {info.dtype}: {', '.join(_DTYPES)} can be read.")
    stored = checkpoint.raw(name)
    dtype = _DTYPES[info.dtype]  # torch sees bytes as another type only where there are any
    tensor = torch.from_numpy(np.array(stored)).view(dtype) if info.nbytes else torch.empty(0, dtype=dtype)
    tensor = tensor.view(info.shape)
    checkpoint.forget(stored)
    return tensor


def _by_suffix(checkpoint: Checkpoint, suffix: str, parts: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each module with a tensor of this suffix: its path, and which of its parts are stored under which names."""
    paths = [name.removesuffix(suffix) for name in checkpoint.tensors if name.endswith(suffix)]
    return {path: {p: f"{path}.{p}" for p in parts if f"{path}.{p}" in checkpoint.tensors} for path in paths}


def _aqlm(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Storage:
    books, bits = config.get("num_codebooks"), config.get("nbits_per_codebook")
    groups = config.get("in_group_size"), config.get("out_group_size")
    if not isinstance(books, int) or not isinstance(bits, int) or groups != (GROUP, 1):
        raise CheckpointError(f"{checkpoint.name}: AQLM with groups of {GROUP} inputs and 1 output can be read.")
    try:
        format = Aqlm(books, bits)
    except FormatError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from error

    def shape(parts: Shapes) -> Shape:
        return parts["codes"][0], parts["codes"][1] * GROUP

    return _storage(checkpoint, "aqlm", format, ".codes", ("codes", "codebooks", "scales"), shape)


def _spqr(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Storage:
    if (config.get("bits"), config.get("beta1"), config.get("beta2")) != (3, TILE, TILE):
        raise CheckpointError(f"{checkpoint.name}: SpQR with 3 bits in tiles of {TILE} x {TILE} can be read.")

    def shape(parts: Shapes) -> Shape:
        rows = parts["row_offsets"][0] - 1
        return rows, parts["dense_weights"][0] * TILE // (-(-rows // TILE) * TILE)

    return _storage(checkpoint, "spqr", Spqr(), ".dense_weights", _SPQR, shape)


_SPQR = ("dense_weights", "row_offsets", "col_vals", "in_perm")


def _int4(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Storage:
    def shape(parts: Shapes) -> Shape:
        return parts["codes"][0], 2 * parts["codes"][1]

    return _storage(checkpoint, "int4", Int4(), ".codes", ("codes", "scales", "zeros"), shape)


def _fp8(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Storage:
    block = config.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(isinstance(size, int) for size in block):
        raise CheckpointError(f"{checkpoint.name}: fp8 weights with scales for blocks, weight_block_size, can be read.")
    try:
        format = Fp8((block[0], block[1]))
    except FormatError as error:
        raise CheckpointError(f"{checkpoint.name}: {error}") from error

    def shape(parts: Shapes) -> Shape:
        rows, width = parts["weight"]
        return rows, width

    return _storage(checkpoint, "fp8", format, ".weight_scale_inv", ("weight", "weight_scale_inv"), shape)


def _storage(
    checkpoint: Checkpoint,
    quant: str,
    format: Format,
    suffix: str,
    parts: tuple[str, ...],
    shape: Callable[[Shapes], Shape],
) -> Storage:
    """Matrices whose parts are called as their format calls them."""

    def matrix(names: dict[str, str]) -> StoredMatrix:
        def size(checkpoint: Checkpoint) -> Shape:
            try:
                return shape({part: checkpoint.info(name).shape for part, name in names.items()})
            except (KeyError, IndexError, ZeroDivisionError, ValueError) as error:
                found = ", ".join(names.values())
                raise CheckpointError(
                    f"{checkpoint.name}: {quant} weights consist of {', '.join(parts)} of one matrix, not of {found}."
                ) from error

        def read(checkpoint: Checkpoint) -> QuantizedTensor:
            rows = size(checkpoint)
            return QuantizedTensor(format, {part: _tensor(checkpoint, name) for part, name in names.items()}, rows)

        return StoredMatrix(tuple(names.values()), read, size, quant in ("int4", "spqr"), format)

    found = _by_suffix(checkpoint, suffix, parts)
    return Storage(quant, {f"{path}.weight": matrix(names) for path, names in found.items()})


def _bitsandbytes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Storage:
    state = "weight.quant_state.bitsandbytes__nf4"
    parts = ("absmax", "nested_absmax", "nested_quant_map", "quant_map")
    fours = _by_suffix(checkpoint, ".weight.absmax", ("weight", *(f"weight.{part}" for part in parts), state))
    eights = _by_suffix(checkpoint, ".SCB", ("weight", "SCB", "weight_format"))
    if bool(fours) == bool(eights):
        raise CheckpointError(f"{checkpoint.name}: bitsandbytes' NF4 or int8 weights can be read, this has other ones.")
    read = _nf4_matrix if fours else _int8_matrix
    matrices = {f"{path}.weight": read(names) for path, names in (fours or eights).items()}
    return Storage("nf4" if fours else "int8", matrices)


def _nf4_matrix(names: dict[str, str]) -> StoredMatrix:
    state = next((name for part, name in names.items() if "quant_state" in part), "")

    def read(checkpoint: Checkpoint) -> QuantizedTensor:
        if not state:
            raise FormatError("bitsandbytes' 4-bit weights of type nf4 can be read.")
        settings = _settings(_tensor(checkpoint, state))
        tensors = {
            part.removeprefix("weight."): _tensor(checkpoint, name) for part, name in names.items() if name != state
        }
        levels = tensors.pop("quant_map", torch.tensor(LEVELS))
        if not torch.equal(levels.float(), torch.tensor(LEVELS)):
            raise FormatError("its levels are not those of NF4.")
        nested = any(part.startswith("nested") for part in tensors)
        if nested:
            tensors["offset"] = torch.tensor([settings["nested_offset"]], dtype=torch.float32)
        return QuantizedTensor(Nf4(nested), tensors, tuple(settings["shape"]))

    return StoredMatrix(tuple(names.values()), read, lambda c: (2 * math.prod(c.info(names["weight"]).shape), 1))


def _settings(blob: Tensor) -> dict[str, Any]:
    """bitsandbytes' JSON beside a 4-bit weight. Raises FormatError."""
    try:
        settings = json.loads(bytes(blob.tolist()))
        shape = settings["shape"]
        sound = settings["blocksize"] == BLOCK and settings.get("nested_blocksize", NESTED) == NESTED
        sound &= len(shape) == 2 and all(isinstance(size, int) and size > 0 for size in shape)
        sound &= math.isfinite(settings.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError("its quantization state is not bitsandbytes' JSON.") from error
    if not sound:
        raise FormatError(f"NF4 in blocks of {BLOCK}, their scales in blocks of {NESTED}, can be read.")
    return dict(settings)


def _int8_matrix(names: dict[str, str]) -> StoredMatrix:
    def read(checkpoint: Checkpoint) -> QuantizedTensor:
        codes, largest = (_tensor(checkpoint, names[part]) for part in ("weight", "SCB"))
        if codes.dim() != 2 or not largest.is_floating_point():
            raise FormatError(f"int8 weights are a matrix with float scales, not {list(codes.shape)}.")
        none = torch.zeros(0, dtype=torch.int32)
        values = torch.zeros(len(codes), 0, dtype=torch.bfloat16)
        tensors = {"codes": codes, "scales": largest.float() / 127, "outliers": none, "values": values}
        return QuantizedTensor(Int8(), tensors, (codes.shape[0], codes.shape[1]))

    return StoredMatrix(tuple(names.values()), read, lambda c: c.info(names["weight"]).shape)
