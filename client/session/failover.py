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
from ..routing.route import NoRoute, Route, is_full, repair_route, same_profiles
from .hop import Hop
from .options import SessionOptions
from .peer_error import PeerError, Refusals
from .pipeline import CHANGE_TIMEOUT_S, REPLAY_ROWS, AnswerLate, Pipeline
from .resume import ResumePoint

log = logging.getLogger(__name__)

# A step that fails on so many peers, one after the other, is itself at fault.
MOST_FAILOVERS = 8
# The peer is well, only the session on it ended: it is asked once more.
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
        change = "" if self.alike else ", in another dtype or quantization: from here on the text is not exact"
        return f"{self.fault}; {took} after {self.pause_s:.2f} s{change}"


class PeerFinder(Protocol):
    """Peers that may take over: KnownPeers."""

    @property
    def rtt_s(self) -> dict[str, float]: ...
    def reachable(self) -> list[pb.PeerRecord]: ...
    def ban(self, peer_id: str) -> None: ...
    async def look(self) -> object: ...
    async def try_banned(self) -> None: ...


class Resumable(Protocol):
    """A session, as whoever changes its route sees it."""

    def resume_point(self) -> ResumePoint:
        """Behind the last step that was answered."""

    async def resend(self) -> None:
        """Send the steps without an answer along the new route. Raises PeerError."""


class RouteKeeper:
    """Keeps a session's pipeline on peers that are well, and tells what it changed."""

    def __init__(self, pipeline: Pipeline, route: Route, finder: PeerFinder, options: SessionOptions) -> None:
        self.route = route
        self._pipeline = pipeline
        self._finder = finder
        self._options = options
        # Changes of route, until the answer after them tells how long they took.
        self._moves: list[tuple[str, tuple[str, ...], bool]] = []
        self._events: list[Failover] = []
        self._failovers = 0
        self._refusals = Refusals()
        self._asked_again: set[str] = set()
        self._waiting_since = 0.0

    def waiting(self) -> None:
        """The session waits for an answer from now on."""
        self._waiting_since = time.monotonic()

    def answered(self) -> None:
        """An answer came: the whole route is well."""
        now = time.monotonic()
        if self._moves:
            pause_s = now - self._waiting_since
            self._events += [Failover(fault, others, pause_s, alike) for fault, others, alike in self._moves]
            self._moves.clear()
        self._waiting_since = now
        self._failovers = 0
        self._refusals = Refusals()
        self._asked_again.clear()
        self._pipeline.all_up_to_date()

    def take_events(self) -> list[Failover]:
        """What happened to the route since the last call."""
        events, self._events = self._events, []
        return events

    async def fail_over(self, error: PeerError, session: Resumable) -> None:
        """Find a route without the peers that failed, and send what has no answer again. Raises NoRoute, PeerError."""
        while True:
            self._failovers += 1
            if self._failovers > MOST_FAILOVERS or not self._may_do_better(error):
                raise error
            try:
                await self._move(str(error), session)
                return
            except PeerError as another:
                error = another

    async def look_into(self, error: AnswerLate, session: Resumable) -> None:
        """An answer is late: see whose compute thread still answers. Who has a spare and hangs is replaced.

        Raises NoRoute, PeerError.
        """
        replayed = self._pipeline.replayed_rows / REPLAY_ROWS
        if time.monotonic() - self._waiting_since > self._options.step_timeout_s * (1 + replayed):
            raise error
        if not any(self._has_spare({hop.stop.peer.peer_id}) for hop in self._pipeline.hops):
            return
        try:
            await self._move(str(error), session, max(CHANGE_TIMEOUT_S, error.waited_s / 4))
        except PeerError as failure:
            await self.fail_over(failure, session)

    async def hand_over(self, session: Resumable) -> None:
        """Move away from peers that are about to leave, where others can take over."""
        leaving = [hop for hop in self._pipeline.hops if hop.draining and not hop.failed]
        full = {r.peer_id for r in self._finder.reachable() if is_full(r, self._options.reserve_tokens)}
        if not leaving or not self._has_spare(full | {hop.stop.peer.peer_id for hop in leaving}):
            return  # it may still finish what runs
        try:
            await self._move(f"peer {leaving[0].stop.name} is leaving", session)
        except NoRoute:
            return
        except PeerError as error:
            await self.fail_over(error, session)

    def _may_do_better(self, error: PeerError) -> bool:
        """Whether there is somebody else to try. One who only refuses is not waited for, nor a third one tried."""
        if not error.refusal:
            return error.replaceable
        return not self._refusals.add(error) and error.replaceable and self._has_spare(self._refusals.peers)

    def _has_spare(self, without: set[str]) -> bool:
        """Whether a route leads past these peers."""
        hops = [hop for hop in self._pipeline.hops if hop.stop.peer.peer_id not in without]
        try:
            plan(hops, self.route, self._finder, self._options, without)
        except NoRoute:
            return False
        return True

    async def _move(self, fault: str, session: Resumable, timeout: float = CHANGE_TIMEOUT_S) -> None:
        """Change the route, and let the session go on along the new one. Raises NoRoute, PeerError."""
        before = {hop.stop.key for hop in self._pipeline.hops if not hop.failed}
        former = self.route
        self.route = await self._changed(session.resume_point(), timeout)
        others = tuple(stop.name for stop in self.route if stop.key not in before)
        self._moves.append((fault, others, same_profiles(former, self.route)))
        await session.resend()

    async def _changed(self, point: ResumePoint, timeout: float) -> Route:
        """Change the pipeline to a route without the peers that failed, and return it.

        Raises NoRoute where some blocks find no peer for `wait_s` seconds, PeerError where no other peer could do
        better.
        """
        pipeline, finder, wait_s = self._pipeline, self._finder, self._options.wait_s
        route, deadline = self.route, None
        given_up: set[Hop] = set()
        full: set[str] = set()
        while True:
            # Once each: a peer that answers again afterwards gets another chance.
            lost = {hop for hop in pipeline.hops if hop.failed or hop.draining} - given_up
            given_up |= lost
            full |= self._give_up(lost)
            try:
                route = plan(pipeline.hops, route, finder, self._options, full)
                await pipeline.change(route, point, timeout)
                return route
            except PeerError as error:
                if not error.replaceable or (error.refusal and not error.busy and self._refusals.add(error)):
                    raise
            except NoRoute as error:
                if deadline is None:
                    deadline = time.monotonic() + wait_s
                    log.warning("%s: waiting up to %g s for another", error, wait_s)
                if time.monotonic() >= deadline:
                    raise NoRoute(f"{error}; waited {wait_s:g} s for another") from error
                full.clear()
                await _look_around(finder, deadline)

    def _give_up(self, hops: Iterable[Hop]) -> set[str]:
        """Ban who is gone; returns those who only have no room."""
        full = set()
        for hop in hops:
            peer_id, error = hop.stop.peer.peer_id, hop.failed
            if error and error.busy:
                full.add(peer_id)
            elif error and error.code in _ASK_AGAIN and hop.max_rows and peer_id not in self._asked_again:
                self._asked_again.add(peer_id)
            else:
                self._finder.ban(peer_id)
        return full


def plan(hops: Sequence[Hop], route: Route, finder: PeerFinder, options: SessionOptions, without: set[str]) -> Route:
    """The route to change to: hops that neither failed nor drain stay. Raises NoRoute."""
    kept = [hop.stop for hop in hops if not hop.failed and not hop.draining]
    records = [record for record in finder.reachable() if record.peer_id not in without]
    return repair_route(
        route, kept, records, finder.rtt_s, options.reserve_tokens, exact=options.exact, mixed=options.mixed
    )


async def _look_around(finder: PeerFinder, deadline: float) -> None:
    """See who is there now; peers that were given up get another chance where they answer."""

    async def look() -> None:
        await finder.try_banned()
        with contextlib.suppress(ConnectError):  # the directory may be out of reach for a while, too
            await finder.look()

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(look(), max(0.1, deadline - time.monotonic()))
    await asyncio.sleep(random.uniform(0.1, 0.3))
