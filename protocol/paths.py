"""Where Petal keeps what must not be lost."""

from __future__ import annotations

from pathlib import Path

import platformdirs


def data_dir() -> Path:
    """Identities, memberships, swarms that one administers, pinned digests."""
    return Path(platformdirs.user_data_dir("petal", appauthor=False))
