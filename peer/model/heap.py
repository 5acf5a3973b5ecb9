"""Freed memory goes back to the system: where large pieces come and go, an allocator keeps what it had at most."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """Give back what can be; nothing happens where the C library is not glibc."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if function is not None:
        function(0)
