"""How often strangers may call: by connection, with a burst that all connections of an address share; by identity."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar
from urllib.parse import unquote

K = TypeVar("K")

# Buckets remembered, those used least recently forgotten first.
_KNOWN = 4096


@dataclass(frozen=True)
class Rate:
    """So many a second, and up to `burst` at once."""

    per_s: float
    burst: float


@dataclass(frozen=True)
class CallRates:
    """Limits of calls. A new connection may begin with `few` calls, and with what is left of its address's burst.

    Who goes on after `patience` refusals is hung up on.
    """

    connection: Rate = Rate(32, 128)
    address: Rate = Rate(64, 1024)
    identity: Rate = Rate(32, 256)
    few: float = 8
    patience: float = 32


USUAL_RATES = CallRates()


class Verdict(Enum):
    """What becomes of a call."""

    ADMITTED = 0
    REFUSED = 1
    HANG_UP = 2


class Buckets(Generic[K]):
    """Token buckets, one for each key."""

    def __init__(self, rate: Rate, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._clock = clock
        self._left: dict[K, tuple[float, float]] = {}  # tokens, and when they were counted

    def __contains__(self, key: K) -> bool:
        return key in self._left

    def left(self, key: K) -> float:
        """Tokens that this key has now."""
        now, rate = self._clock(), self._rate
        tokens, since = self._left.get(key, (rate.burst, now))
        return min(rate.burst, tokens + (now - since) * rate.per_s)

    def put(self, key: K, tokens: float) -> None:
        """From now on it has so many; they may be less than none."""
        self._left.pop(key, None)
        self._left[key] = tokens, self._clock()
        if len(self._left) > _KNOWN:
            del self._left[next(iter(self._left))]

    def take(self, key: K) -> bool:
        """Whether there was one left."""
        left = self.left(key)
        if left >= 1:
            self.put(key, left - 1)
        return left >= 1


class CallLimiter:
    """Decides on each call by where it comes from, before anything is done for it."""

    def __init__(self, rates: CallRates, clock: Callable[[], float] = time.monotonic) -> None:
        self._rates = rates
        self._connections: Buckets[str] = Buckets(rates.connection, clock)
        self._addresses: Buckets[str] = Buckets(rates.address, clock)

    def call(self, connection: str) -> Verdict:
        """A call came over this connection, as gRPC names it."""
        left = self._connections.left(connection) if connection in self._connections else self._first(connection)
        self._connections.put(connection, left - 1)
        if left >= 1:
            return Verdict.ADMITTED
        is_last = -self._rates.patience - 1 < left <= -self._rates.patience  # later ones were on their way
        return Verdict.HANG_UP if is_last else Verdict.REFUSED

    def _first(self, connection: str) -> float:
        """What a new connection begins with; who comes back again and again uses its address's burst up."""
        address, rates = address_of(connection), self._rates
        left = self._addresses.left(address)
        granted = max(rates.few, min(rates.connection.burst, left))
        self._addresses.put(address, max(0.0, left - granted))
        return granted


def address_of(connection: str) -> str:
    """Who is at the other end of "ipv4:1.2.3.4:56": its host; of IPv6 the network that one customer gets."""
    host = unquote(connection).partition(":")[2].rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else host
