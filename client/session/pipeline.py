"""A route in use: a hop to every peer, each peer linked to the next; it can change while the session goes on."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterable
from itertools import pairwise
from typing import Any

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.trust.channels import Channels
from ...protocol.wire.codec import row_bytes
from ...protocol.wire.limits import PROTOCOL
from ..routing.route import Route, Stop
from .hop import Hop
from .options import SessionOptions
from .peer_error import PeerError
from .resume import ResumePoint, replay_steps, resume_messages

# A peer that takes longer to open a session or a link is as good as gone.
OPEN_TIMEOUT_S = 5.0
# In mid-session somebody waits, and others may take its place.
CHANGE_TIMEOUT_S = 2.5
# Token ids of one replayed chunk.
REPLAY_ROWS = 512


class AnswerLate(PeerError):
    """No peer says that anything is wrong."""

    def __init__(self, waited_s: float) -> None:
        super().__init__("route", grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {waited_s:.3g} s")
        self.waited_s = waited_s


class Pipeline:
    """Hops to the peers of a route. Whatever waits for a peer raises PeerError once any of them has failed."""

    def __init__(self, channels: Channels, options: SessionOptions) -> None:
        self.session_id = secrets.token_bytes(16)
        self.hops: list[Hop] = []
        self.epoch = 0
        self._channels = channels
        self._options = options
        # Some peer is about to leave, or was when the route last changed.
        self.draining = False
        # None says that a hop failed.
        self._results: asyncio.Queue[pb.Result | None] = asyncio.Queue()
        # Of a replay, which come before the next answer.
        self.replayed_rows = 0

    @property
    def max_rows(self) -> int:
        """Rows that the peers take in a step."""
        most = min(hop.max_rows for hop in self.hops)
        if ends := self._options.local_ends:
            width = self.hops[0].stop.peer.hidden_size
            most = min(most, ends.most_rows(row_bytes(self._options.codec, width)))
        return most

    @property
    def max_nodes(self) -> int:
        """Rows of a tree below row 0; none where a peer knows no trees."""
        if not all("tree" in hop.features for hop in self.hops):
            return 0
        return min(self.max_rows - 1, *(hop.max_nodes for hop in self.hops))

    @property
    def rope_borders(self) -> frozenset[int]:
        """Lengths beyond which a sequence has other angles in all its rows."""
        return frozenset().union(*(hop.rope_borders for hop in self.hops))

    async def open(self, route: Route, fork_of: bytes = b"") -> None:
        """Reserve on every peer and join the links, or release all and raise PeerError."""
        self.epoch += 1
        self.hops = [self._hop(stop) for stop in route]
        try:
            await _all(self._open(hop, OPEN_TIMEOUT_S, fork_of=fork_of) for hop in self.hops)
            await self._link(OPEN_TIMEOUT_S)
        except BaseException:
            self.close()
            self.hops = [hop for hop in self.hops if hop.failed]
            raise
        self.all_up_to_date()

    async def change(self, route: Route, point: ResumePoint, timeout: float = CHANGE_TIMEOUT_S) -> None:
        """Go over to `route`: who stays goes back to where the session stands, newcomers get what they lack.

        Who stays answers from its compute thread, within `timeout` seconds: one that hangs has failed, too.
        Raises PeerError; the hops that have not failed then can be changed again.
        """
        self.epoch += 1
        wanted = {stop.key for stop in route}
        staying = {hop.stop.key: hop for hop in self.hops if not hop.failed and hop.stop.key in wanted}
        for hop in self.hops:
            if staying.get(hop.stop.key) is not hop:
                hop.close()
        self.hops = [staying.get(stop.key) or self._hop(stop) for stop in route]
        self.draining = any(hop.draining for hop in self.hops)
        # A peer whose outputs are lost needs a replay itself, which the peers before it then have to hear.
        while untold := [(hop, message) for hop, message in self._resume_messages(point) if hop.told != message]:
            await _all(self._tell(hop, message, timeout) for hop, message in untold)
        # What the peers said before they heard of the new route concerns nobody any more.
        self._results = asyncio.Queue()
        await self._link(CHANGE_TIMEOUT_S)
        if not self.hops[0].up_to_date:
            await self._replay(point)

    def all_up_to_date(self) -> None:
        """A step went through the whole route: every peer has all rows."""
        for hop in self.hops:
            hop.up_to_date = True
        self.replayed_rows = 0

    def close(self) -> None:
        """End the session on every peer."""
        for hop in self.hops:
            hop.close()

    async def result(self, patience_s: float) -> pb.Result:
        """The next part of an answer. Raises PeerError, AnswerLate after `patience_s` seconds."""
        while True:
            if self._results.empty():  # an answer that is here is good, whoever failed since
                self._raise_failure()
            try:
                result = await asyncio.wait_for(self._results.get(), patience_s)
            except asyncio.TimeoutError:
                raise AnswerLate(patience_s) from None
            if result is not None:
                return result

    def _raise_failure(self) -> None:
        for hop in self.hops:
            if hop.failed:
                raise hop.failed

    # Opening, linking, replaying.

    def _hop(self, stop: Stop) -> Hop:
        return Hop(stop, self._channels.to(stop.peer), self._deliver)

    async def _open(self, hop: Hop, timeout: float, *, fork_of: bytes = b"", resume: pb.Resume | None = None) -> None:
        stop, options, trust = hop.stop, self._options, self._channels.trust
        features = {"exact": options.exact, "embeddings": options.local_ends is not None}
        grammar = options.grammar if stop.blocks.stop == stop.peer.n_blocks else None
        if grammar:
            features[grammar.feature] = True
        message = pb.Open(
            session_id=self.session_id,
            client_id=trust.client_id,
            protocol=PROTOCOL,
            required_features=[name for name, needed in features.items() if needed],
            model_digest=stop.peer.model_digest,
            start=stop.blocks.start,
            end=stop.blocks.stop,
            reserve_tokens=options.reserve_tokens,
            codec=options.codec,
            route_epoch=self.epoch,
            fork_of=fork_of,
            priority=options.priority,
            resume=resume,
            grammar=grammar.text if grammar else "",
            hello=trust.hello(stop.peer, self.session_id),
            revocations=trust.revocations,
        )
        opened = await hop.open(message, timeout)
        trust.learn(opened.revocations)

    def _resume_messages(self, point: ResumePoint) -> list[tuple[Hop, pb.Resume]]:
        messages = resume_messages([hop.up_to_date for hop in self.hops], self.epoch, point)
        return list(zip(self.hops, messages, strict=True))

    async def _tell(self, hop: Hop, message: pb.Resume, timeout: float) -> None:
        hop.told = message
        if not hop.max_rows:
            await self._open(hop, CHANGE_TIMEOUT_S, resume=message)
            return
        reply = await hop.ask(pb.ClientFrame(resume=message), hop, timeout)
        hop.link_token = reply.resumed.link_token
        if reply.resumed.log_lost:
            hop.up_to_date = False

    async def _link(self, timeout: float) -> None:
        """Let each peer dial the next one, with the token that the next one gave out."""

        def link(after: Hop) -> pb.ClientFrame:
            to = pb.LinkTo(peer_id=after.stop.peer.peer_id, token=after.link_token, route_epoch=self.epoch)
            return pb.ClientFrame(link_to=to)

        await _all(hop.ask(link(after), after, timeout) for hop, after in pairwise(self.hops))
        self._raise_failure()

    async def _replay(self, point: ResumePoint) -> None:
        """Give the first stage the tokens again; the replay flows on as far as peers lack rows."""
        steps = replay_steps(point, self.epoch, min(REPLAY_ROWS, self.max_rows))
        self.replayed_rows = len(point.ids)
        for step in steps:
            if self._options.local_ends:
                await self._options.local_ends.embed(step, self._options.codec)
            await self.hops[0].send(pb.ClientFrame(step=step))

    # Frames from peers.

    def _deliver(self, hop: Hop, frame: pb.PeerFrame | PeerError) -> None:
        if hop not in self.hops:
            return
        if isinstance(frame, PeerError):
            self._results.put_nowait(None)
        elif frame.HasField("result"):
            self._results.put_nowait(frame.result)
        elif frame.HasField("draining"):
            self.draining = hop.draining = True
        else:
            self._fault(hop, frame.fault)

    def _fault(self, hop: Hop, fault: pb.Fault) -> None:
        """A peer cannot reach the next one, whatever we hear from that one ourselves."""
        if fault.route_epoch < self.epoch:
            return
        lost = next((other for other in self.hops if other.stop.peer.peer_id == fault.peer_id), hop)
        reason = f"peer {hop.stop.name} cannot reach it: {fault.reason}"
        hop.refuse(lost.fail_with(grpc.StatusCode.UNAVAILABLE, reason))
        self._results.put_nowait(None)


async def _all(work: Iterable[Coroutine[Any, Any, Any]]) -> None:
    """Do all of it, side by side, to the end; then raise the first error."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
