"""Files that only their owner may read, replaced in one piece; nothing stays of a writer that died."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path

_SUFFIX = ".tmp"
# Whoever writes for so long is gone.
_STALE_S = 600


def write_private(path: Path, data: bytes) -> None:
    """Make or replace the file at `path`, with mode 0600; on disk once this returns. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}."
    remove_stale(path.parent, f"{prefix}*{_SUFFIX}")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=_SUFFIX)  # made with mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def remove_stale(folder: Path, pattern: str) -> None:
    """Delete half-written files whose names fit `pattern`, unless somebody may still be writing them."""
    before = time.time() - _STALE_S
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # another process cleans, too
            if path.stat().st_mtime < before:
                path.unlink()
