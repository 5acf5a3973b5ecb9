"""Where Petal keeps what must not be lost, and what can be made again."""

from __future__ import annotations

import atexit
import functools
import logging
import shutil
import tempfile
from pathlib import Path

import platformdirs

log = logging.getLogger(__name__)


def data_dir() -> Path:
    """Identities, memberships, swarms that one administers, pinned digests. Raises OSError where there is no home."""
    folder = Path(platformdirs.user_data_dir("petal", appauthor=False))
    if not folder.is_absolute():  # "~" stands for nothing
        raise OSError("this user has no home folder; set HOME or XDG_DATA_HOME to a folder that can be written to")
    return folder


def cache_dir() -> Path:
    """What can be made again; where the user's own folder cannot be written to, one that goes with this process."""
    folder = Path(platformdirs.user_cache_dir("petal", appauthor=False))
    try:
        if not folder.is_absolute():
            raise OSError(f"{folder} is no place")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return _passing(str(error))
    return folder


@functools.cache
def _passing(reason: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="petal-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    log.warning("nothing is cached beyond this run (%s); set XDG_CACHE_HOME to a folder that can be written to", reason)
    return folder
