"""The safetensors container: a bounded header and a view of the stored bytes. A broken file gives CheckpointError.

Own code, though there is a library of that name: clients read headers without torch, bf16 and eight-bit floats come as
the bytes that are digested and repacked, and pages that were read can be let go again.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from .json_files import MAX_JSON
from .layout import CheckpointError, TensorInfo
from .mapped import MappedFile

# Bits of a value; types packed below a byte are known by size only.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_DENSE: dict[str, type] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


@dataclass(frozen=True)
class _Entry:
    info: TensorInfo
    offset: int


class SafetensorsFile:
    """An open safetensors file; `tensors` by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            if size < 10:
                raise self._broken("it is too short")
            self._map = MappedFile(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}.") from error
        file = self._map.data
        length = int(file[:8].view("<u8")[0])
        if length > min(MAX_JSON, size - 8):
            raise self._broken(f"a header of {length} bytes does not fit")
        self._data = file[8 + length :]
        self._entries = self._table(self._header(bytes(file[8 : 8 + length])))
        self._check_places()
        self.tensors = {name: entry.info for name, entry in self._entries.items()}

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """Stored bytes of a tensor: a flat read-only view of the file."""
        entry = self._entries[name]
        return np.asarray(self._data[entry.offset : entry.offset + entry.info.nbytes])

    def read(self, name: str) -> npt.NDArray[Any]:
        """Values as float32, float16 or, for BF16, uint16 bits: a read-only view where the file aligns it.

        Raises CheckpointError for any other type.
        """
        info = self.tensors[name]
        if info.dtype not in _DENSE:
            raise CheckpointError(f"{self.path}: {name} has type {info.dtype}: only {', '.join(_DENSE)} can be read.")
        return np.require(self.raw(name).view(_DENSE[info.dtype]).reshape(info.shape), requirements="A")

    def forget(self, view: npt.NDArray[Any]) -> None:
        """See MappedFile.forget; a copy is nobody's view, hence left alone."""
        if np.may_share_memory(view, self._data):
            self._map.forget(view)

    def close(self) -> None:
        """Drop the map; views handed out keep their part alive."""
        self._map.data = self._data = np.empty(0, np.uint8)

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is no sound safetensors file, {what}: download it again.")

    def _header(self, text: bytes) -> dict[str, Any]:
        try:
            header = json.loads(text, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise self._broken("its header is not JSON") from error
        if not isinstance(header, dict):
            raise self._broken("its header is not a JSON object")
        header.pop("__metadata__", None)
        return header

    def _table(self, header: dict[str, Any]) -> dict[str, _Entry]:
        return {name: self._entry(name, fields) for name, fields in header.items()}

    def _entry(self, name: str, fields: Any) -> _Entry:
        if not isinstance(fields, dict):
            raise self._broken(f"the entry {name[:80]!r} is not an object")
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in _BITS:
            raise self._broken(f"{name[:80]!r} has the unknown type {str(dtype)[:20]!r}")
        if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 16:
            raise self._broken(f"{name[:80]!r} has no valid shape or offsets")
        start, end = offsets
        if end < start or (end - start) * 8 != math.prod(shape) * _BITS[dtype]:
            raise self._broken(f"the bytes of {name[:80]!r} do not suit its shape")
        return _Entry(TensorInfo(name, tuple(shape), dtype, end - start), start)

    def _check_places(self) -> None:
        end = 0
        for entry in sorted(self._entries.values(), key=lambda entry: (entry.offset, entry.info.nbytes)):
            if entry.offset < end:
                raise self._broken(f"{entry.info.name[:80]!r} overlaps another tensor")
            end = entry.offset + entry.info.nbytes
        if end > len(self._data):
            raise self._broken(f"it is truncated by {end - len(self._data)} bytes")


def _counts(value: Any) -> TypeGuard[list[int]]:
    """True for a list of non-negative integers of sane size."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key comes twice")
    return found
