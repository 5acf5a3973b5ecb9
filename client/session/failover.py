"""Going on where peers fail or leave: who takes their place, and for how long to wait for one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from ...protocol import petal_pb2 as pb
from ..routing.peers import ConnectError
from ..routing.route import NoRoute, Route, repair_route
from .pipeline import Leg, OpenRoute, SessionOptions, Standpoint
from .stream import PeerError

log = logging.getLogger(__name__)

# The peer is well, only the session on it ended.
_ASK_AGAIN = frozenset({grpc.StatusCode.ABORTED, grpc.StatusCode.DEADLINE_EXCEEDED})


@dataclass(frozen=True)
class Failover:
    """A change of route in mid-session. `pause_s`: how long the step took, the detection of the fault included.

    `alike`: every block is still computed in the dtype and quantization of before.
    """

    fault: str
    replacements: tuple[str, ...]
    pause_s: float
    alike: bool = True

    def __str__(self) -> str:
        took = f"{' and '.join(self.replacements)} took over" if self.replacements else "the same peers go on"
        kind = "" if self.alike else ", in another dtype or quantization: from here on the text is not exact"
        return f"{self.fault}; {took} after {self.pause_s:.2f} s{kind}"


class PeerFinder(Protocol):
    """Peers that may take over: KnownPeers."""

    @property
    def rtt_s(self) -> dict[str, float]: ...
    def reachable(self) -> list[pb.PeerRecord]: ...
    def ban(self, peer_id: str) -> None: ...
    async def look(self) -> object: ...
    async def try_banned(self) -> None: ...


async def move(
    line: OpenRoute, route: Route, finder: PeerFinder, options: SessionOptions, standpoint: Standpoint
) -> Route:
    """Change `line` to a route without the peers that failed, and return it.

    Raises NoRoute where some blocks find no peer for `wait_s` seconds, PeerError where no other peer could do better.
    """
    deadline: float | None = None
    given_up: set[Leg] = set()
    full: set[str] = set()
    while True:
        # Once each: a peer that answers again afterwards gets another chance.
        lost = {leg for leg in line.legs if leg.failed or leg.draining} - given_up
        given_up |= lost
        full |= _give_up(lost, finder)
        try:
            route = plan(line.legs, route, finder, options, full)
            await line.change(route, standpoint)
            return route
        except PeerError as error:
            if not (error.replaceable or error.busy):
                raise
        except NoRoute as error:
            if deadline is None:
                deadline = time.monotonic() + options.wait_s
                log.warning("%s: waiting up to %g s for another", error, options.wait_s)
            if time.monotonic() >= deadline:
                raise NoRoute(f"{error}; waited {options.wait_s:g} s for another") from error
            full.clear()
            await _look_around(finder, deadline)


def plan(legs: Sequence[Leg], route: Route, finder: PeerFinder, options: SessionOptions, without: set[str]) -> Route:
    """The route to change to: legs that neither failed nor drain stay. Raises NoRoute."""
    kept = [leg.stop for leg in legs if not leg.failed and not leg.draining]
    records = [record for record in finder.reachable() if record.peer_id not in without]
    return repair_route(
        route, kept, records, finder.rtt_s, options.reserve_tokens, exact=options.exact, mixed=options.mixed
    )


def _give_up(legs: Iterable[Leg], finder: PeerFinder) -> set[str]:
    """Ban who is gone; returns those who only have no room."""
    full = set()
    for leg in legs:
        if leg.failed and leg.failed.busy:
            full.add(leg.stop.peer.peer_id)
        elif leg.draining or (leg.failed and leg.failed.code not in _ASK_AGAIN):
            finder.ban(leg.stop.peer.peer_id)
    return full


async def _look_around(finder: PeerFinder, deadline: float) -> None:
    """See who is there now; peers that were given up get another chance where they answer."""

    async def look() -> None:
        await finder.try_banned()
        with contextlib.suppress(ConnectError):  # the directory may be out of reach for a while, too
            await finder.look()

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(look(), max(0.1, deadline - time.monotonic()))
    await asyncio.sleep(random.uniform(0.1, 0.3))
