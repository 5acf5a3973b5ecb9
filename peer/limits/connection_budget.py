"""How many connections a peer may have, and which of them it closes so that others find room."""

from __future__ import annotations

import contextlib
import resource
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from .rates import address_of

# Files for all else: checkpoint, links to next peers, the directory.
OTHER_FILES = 96
FEWEST, MOST = 16, 16_384
# Beyond this part of the budget connections without a session are closed, down to the other.
_FULL, _AIM = 0.75, 0.5


@dataclass(frozen=True)
class Connection:
    """Somebody's connection to this peer: its name, whether a session or link runs over it, and for how long it is."""

    name: str
    serves: bool
    age_s: float


def connection_budget(open_files: int) -> int:
    """Connections that this process can hold beside the files that it has open; raises its soft limit first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    unlimited = soft == resource.RLIM_INFINITY
    return MOST if unlimited else max(FEWEST, min(MOST, soft - open_files - OTHER_FILES))


def to_close(connections: Iterable[Connection], budget: int) -> list[str]:
    """Names of those that go: never one that serves; first those of addresses with many, of these the oldest."""
    connections = list(connections)
    if len(connections) <= _FULL * budget:
        return []
    crowd = Counter(address_of(connection.name) for connection in connections)
    idle = [connection for connection in connections if not connection.serves]
    idle.sort(key=lambda connection: (-crowd[address_of(connection.name)], -connection.age_s))
    return [connection.name for connection in idle[: len(connections) - int(_AIM * budget)]]
