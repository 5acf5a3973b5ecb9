"""A file as a memory map whose pages can be let go again: what was read once need not stay resident."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class MappedFile:
    """The bytes of a file, read-only; raises OSError or, for an empty file, ValueError."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self._start = self.data.ctypes.data

    def forget(self, view: npt.NDArray[Any]) -> None:
        """Let go of the whole pages under a contiguous view of `data`; reading them again fetches them again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = -(-(view.ctypes.data - self._start) // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (view.ctypes.data + view.nbytes - self._start) // mmap.PAGESIZE * mmap.PAGESIZE
        if start < stop:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
