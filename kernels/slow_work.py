"""Work that may rightly take long: a watchdog waits for it as long as it says, not as long as for a forward."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

# When those that run will be over at the latest, in seconds of the monotonic clock.
_until: list[float] = []


@contextmanager
def slow_work(limit_s: float) -> Iterator[None]:
    """Around compiling or capturing on the compute thread."""
    until = time.monotonic() + limit_s
    _until.append(until)
    try:
        yield
    finally:
        _until.remove(until)


def is_declared() -> bool:
    """Whether some is under way, and within its limit."""
    return any(until > time.monotonic() for until in tuple(_until))
