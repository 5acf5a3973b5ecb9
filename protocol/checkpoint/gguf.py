"""The GGUF container, versions 2 and 3, little endian: metadata, tensor table and a view of the stored bytes.

Every count, length and offset is checked against the file before it is used: a broken file gives CheckpointError.
Own code, though the `gguf` package reads these files: that one is a developer's tool, for files that one trusts; this
one is for strangers' files, and is fuzzed.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .gguf_types import GGML_TYPES, GgmlType
from .layout import CheckpointError
from .mapped import MappedFile

_SCALARS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?"))) | {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
_COUNT = struct.Struct("<Q")
_MAX_KEYS, _MAX_TENSORS, _MAX_NAME = 1 << 16, 1 << 20, 1 << 16
_MAX_ALIGNMENT = 1 << 16


@dataclass(frozen=True)
class StoredTensor:
    """One entry of the tensor table. `shape` is row-major (slowest first), `offset` counts from the data's start."""

    name: str
    shape: tuple[int, ...]
    kind: GgmlType
    offset: int
    nbytes: int


class GgufFile:
    """An open GGUF file: `metadata` by key (arrays of numbers as ndarray, of strings as list), `tensors` by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.stat().st_size < 24:
                raise CheckpointError(f"{path} is too short for a GGUF file: download it again.")
            self._map = MappedFile(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from error
        cursor = _Cursor(self._map.data, path)
        if bytes(cursor.take(4)) != b"GGUF":
            raise CheckpointError(f"{path} does not begin like a GGUF file: give a GGUF file.")
        version = cursor.scalar("<u4")
        if version not in (2, 3):
            raise CheckpointError(f"{path} has GGUF version {version}: versions 2 and 3, little endian, can be read.")
        n_tensors, n_keys = cursor.count(_MAX_TENSORS, 24), cursor.count(_MAX_KEYS, 13)
        self.metadata = _metadata(cursor, n_keys)
        self.tensors = _table(cursor, n_tensors)
        self._data = self._map.data[self._data_start(cursor) :]
        _check_places(self.tensors, len(self._data), self._alignment(), path)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Stored bytes of a tensor: a flat read-only view of the file."""
        tensor = self.tensors[name]
        return np.asarray(self._data[tensor.offset : tensor.offset + tensor.nbytes])

    def file_of(self, name: str) -> Path:
        """Where a tensor is stored."""
        return self.path

    def forget(self, view: npt.NDArray[Any]) -> None:
        """See MappedFile.forget; a copy is nobody's view, hence left alone."""
        if np.may_share_memory(view, self._data):
            self._map.forget(view)

    def close(self) -> None:
        """Drop the map; views handed out keep their part alive."""
        self._map.data = self._data = np.empty(0, np.uint8)

    def _alignment(self) -> int:
        value = self.metadata.get("general.alignment", 32)
        if not isinstance(value, int) or not 8 <= value <= _MAX_ALIGNMENT or value % 8:
            raise CheckpointError(f"{self.path} is corrupt: its alignment must be a multiple of 8: download it again.")
        return value

    def _data_start(self, cursor: _Cursor) -> int:
        alignment = self._alignment()
        return -(-cursor.at // alignment) * alignment


class _Cursor:
    """Reads forward through the file and never past its end."""

    def __init__(self, data: npt.NDArray[np.uint8], path: Path) -> None:
        self._data, self.at, self.path = data.data, 0, path

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is corrupt: {what} near byte {self.at}: download it again.")

    def take(self, size: int) -> memoryview:
        if size > len(self._data) - self.at:
            raise self.fail("it ends too early")
        self.at += size
        return self._data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        dtype = np.dtype(code)
        return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()

    def count(self, limit: int, item_size: int) -> int:
        """A count whose items, of at least `item_size` bytes each, still fit in the file."""
        (count,) = _COUNT.unpack(self.take(8))
        if count > limit or count * item_size > len(self._data) - self.at:
            raise self.fail(f"a count of {count} does not fit")
        return count

    def string(self, limit: int) -> str:
        try:
            return str(self.take(self.count(limit, 1)), "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail("a text is not UTF-8") from error

    def strings(self, count: int) -> list[str]:
        """As `string` does, in one loop: a vocabulary and its merges are a hundred thousand texts."""
        data, at, end, size_at = self._data, self.at, len(self._data), _COUNT.unpack_from
        texts = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + size_at(data, at)[0]
                if at > end or at - start > _MAX_NAME:
                    self.at = start
                    raise self.fail("a text does not fit")
                texts.append(str(data[start:at], "utf-8"))
        except (struct.error, UnicodeDecodeError) as error:
            self.at = at
            raise self.fail("a text is cut off or not UTF-8") from error
        self.at = at
        return texts

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string(len(self._data))
        if kind == _ARRAY:
            return self.array(self.scalar("<u4"))
        if kind not in _SCALARS:
            raise self.fail(f"{kind} is no value type")
        return self.scalar(_SCALARS[kind])

    def array(self, kind: int) -> npt.NDArray[Any] | list[str]:
        if kind == _STRING:
            return self.strings(self.count(len(self._data), 8))
        if kind not in _SCALARS:
            raise self.fail(f"an array of type {kind} cannot be read")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self.take(self.count(len(self._data), dtype.itemsize) * dtype.itemsize), dtype)


def _metadata(cursor: _Cursor, n_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = cursor.string(_MAX_NAME)
        if key in metadata:
            raise cursor.fail(f"the key {key[:80]!r} comes twice")
        metadata[key] = cursor.value(cursor.scalar("<u4"))
    return metadata


def _table(cursor: _Cursor, n_tensors: int) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for _ in range(n_tensors):
        tensor = _entry(cursor)
        if tensor.name in tensors:
            raise cursor.fail(f"the tensor {tensor.name[:80]!r} comes twice")
        tensors[tensor.name] = tensor
    return tensors


def _entry(cursor: _Cursor) -> StoredTensor:
    name = cursor.string(_MAX_NAME)
    n_dims = cursor.scalar("<u4")
    if not 1 <= n_dims <= 4:
        raise cursor.fail(f"the tensor {name[:80]!r} has {n_dims} dimensions")
    # The file lists the fastest dimension first.
    shape = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims))[::-1]
    kind = GGML_TYPES.get(cursor.scalar("<u4"))
    if kind is None:
        raise cursor.fail(f"the tensor {name[:80]!r} has an unknown type")
    if min(shape) == 0 or shape[-1] % kind.block:
        raise cursor.fail(f"the shape {list(shape)} of tensor {name[:80]!r} does not suit {kind.name}")
    return StoredTensor(name, shape, kind, cursor.scalar("<u8"), math.prod(shape) // kind.block * kind.size)


def _check_places(tensors: dict[str, StoredTensor], size: int, alignment: int, path: Path) -> None:
    end = 0
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset % alignment or tensor.offset < end:
            raise CheckpointError(f"{path} is corrupt: {tensor.name[:80]!r} is misplaced: download it again.")
        end = tensor.offset + tensor.nbytes
    if end > size:
        raise CheckpointError(f"{path} is truncated: {end - size} bytes of tensors are missing: download it again.")
