"""What a peer tells while it starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass
class StartProgress:
    """`stage`: what goes on now; `loading`: bytes done, of how many; `note`: what its owner should know."""

    stage: Callable[[str], None] = lambda text: None
    loading: Callable[[int, int], None] = lambda done, total: None
    note: Callable[[str], None] = lambda text: None
