"""How much memory this machine can still give."""

from __future__ import annotations

import re
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
_UNKNOWN = 1 << 40


def available_bytes() -> int:
    """What programs can have without swapping; file pages that are only cached count, since they make room.

    A terabyte where the system does not say.
    """
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
    except OSError:
        return _UNKNOWN
    return int(found[1]) * 1024 if found else _UNKNOWN
