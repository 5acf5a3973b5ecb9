"""torch and transformers, which a client needs only where it runs a model itself."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_NAMES = ("torch", "transformers")
# While another thread imports them: they take seconds, on a busy machine many.
_TRIES, _PAUSE_S = 40, 0.5


def are_installed() -> bool:
    """Whether both are there, imported or not."""
    return all(map(importlib.util.find_spec, _NAMES))


def import_beside_others(imports: Callable[[], T]) -> T:
    """What `imports` returns, though another thread imports the same packages now. Raises ImportError.

    transformers loads its parts as they are asked for: a thread that comes while another one is at it may find some
    missing. They are there a moment later.
    """
    for _ in range(_TRIES):
        try:
            return imports()
        except ImportError:
            if not are_installed():
                raise
        time.sleep(_PAUSE_S)
    return imports()
