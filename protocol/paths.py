"""Where Petal keeps what must not be lost, and what can be made again."""

from __future__ import annotations

import atexit
import functools
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import platformdirs

log = logging.getLogger(__name__)


def data_dir() -> Path:
    """Identities, memberships, swarms that one administers, pinned digests. Raises OSError where there is no home."""
    folder = _of_user(platformdirs.user_data_dir)
    if folder is None:
        raise OSError("this user has no home folder; set HOME or XDG_DATA_HOME to a folder that can be written to")
    return folder


def cache_dir() -> Path:
    """What can be made again; where the user's own folder cannot be written to, one that goes with this process."""
    folder = _of_user(platformdirs.user_cache_dir)
    try:
        if folder is None:
            raise OSError("this user has no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return _passing(str(error))
    return folder


def _of_user(place: Callable[..., str]) -> Path | None:
    try:
        folder = Path(place("petal", appauthor=False))
    except RuntimeError:  # newer versions look the user up
        return None
    return folder if folder.is_absolute() else None  # older ones leave "~" for nobody's home


@functools.cache
def _passing(reason: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="petal-cache-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    log.warning("nothing is cached beyond this run (%s); set XDG_CACHE_HOME to a folder that can be written to", reason)
    return folder
