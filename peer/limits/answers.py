"""How much a peer holds of answers that are in the making or that nobody has read yet, of all its sessions together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Who has read nothing for so long, though something was there, makes room before anybody is refused.
STALLED_S = 2.0


@dataclass(frozen=True)
class Owed:
    """What one session has not read yet: how much, and for how many seconds it has read nothing of it."""

    size: int
    stalled_s: float


def in_the_way(owed: Mapping[bytes, Owed], asking: bytes, cap: int) -> list[bytes]:
    """The sessions that end so that all answers fit `cap` bytes: of those that stall the largest, else who asks."""
    excess = sum(each.size for each in owed.values()) - cap
    ending: list[bytes] = []
    stalled = (session for session, each in owed.items() if each.stalled_s >= STALLED_S and each.size)
    for session in sorted(stalled, key=lambda session: -owed[session].size):
        if excess <= 0:
            break
        ending.append(session)
        excess -= owed[session].size
    if excess > 0 and asking not in ending:
        ending.append(asking)
    return ending
