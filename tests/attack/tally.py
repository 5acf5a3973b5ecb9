"""Counting attacks: how many were tried, and which were let in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Tally:
    """`rounds` scales the attacks that are drawn at random."""

    rounds: int
    random: random.Random
    tried: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)

    def count(self, attack: str, accepted: bool) -> None:
        self.tried[attack] = self.tried.get(attack, 0) + 1
        self.accepted[attack] = self.accepted.get(attack, 0) + accepted

    def refused(self, attack: str, attempt: Callable[[], Any], *errors: type[Exception]) -> None:
        """An attempt that must end in one of `errors`; any other exception is a fault of ours and is raised."""
        try:
            attempt()
        except errors:
            self.count(attack, False)
        else:
            self.count(attack, True)

    @contextmanager
    def refuses(self, attack: str, *errors: type[Exception]) -> Iterator[None]:
        """The same for code that awaits."""
        try:
            yield
        except errors:
            self.count(attack, False)
        else:
            self.count(attack, True)

    def damaged(self, data: bytes) -> bytes:
        """`data` with one bit or a few bytes changed, cut short, or longer."""
        changed = bytearray(data)
        kind = self.random.randrange(4)
        place = self.random.randrange(len(changed))
        if kind == 0:
            changed[place] ^= 1 << self.random.randrange(8)
        elif kind == 1:
            changed[place : place + 4] = self.random.randbytes(4)
        elif kind == 2:
            del changed[place:]
        else:
            changed[place:place] = self.random.randbytes(self.random.randrange(1, 9))
        return bytes(changed) if bytes(changed) != data else data + b"\0"
