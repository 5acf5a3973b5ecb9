"""A route in use: a stream to every peer, each peer linked to the next; it can change while the session goes on."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine as Work
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.trust.channels import Channels
from ...protocol.wire.codec import row_bytes
from ...protocol.wire.limits import PROTOCOL
from ..routing.route import Route, Stop
from .stream import PeerError, PeerStream

if TYPE_CHECKING:
    from .local_ends import LocalHead

# A peer that takes longer to open a session or a link is as good as gone.
OPEN_TIMEOUT_S = 5.0
# In mid-session somebody waits, and others may take its place.
CHANGE_TIMEOUT_S = 2.5
# Token ids of one replayed chunk.
REPLAY_ROWS = 512


@dataclass(frozen=True)
class SessionOptions:
    """What a session asks of its peers. `wait_s`: for how long it waits for blocks that nobody hosts any more.

    `mixed`: peers that take over may compute in another dtype or quantization. `head`: where this machine embeds and
    draws, and peers get no token ids.
    """

    reserve_tokens: int
    codec: pb.Codec = pb.FLOAT32
    exact: bool = False
    mixed: bool = False
    priority: int = 0
    step_timeout_s: float = 120.0
    wait_s: float = 30.0
    head: LocalHead | None = None


@dataclass(frozen=True)
class Standpoint:
    """Where a session stands: behind `step`, with these tokens cached; `commit` are that step's accepted rows."""

    step: int
    ids: Sequence[int]
    commit: Sequence[int]


class Leg:
    """One stop of a route in use. `whole`: the peer holds every row; `failed`: why it is of no use any more."""

    def __init__(self, stop: Stop, stream: PeerStream) -> None:
        self.stop = stop
        self.stream = stream
        self.whole = False
        self.draining = False
        self.failed: PeerError | None = None
        self.max_rows = self.max_nodes = 0
        self.features: frozenset[str] = frozenset()
        self.token = b""
        # What it was told of the newest route, and what it has to answer.
        self.told: pb.Resume | None = None
        self.reply: asyncio.Future[pb.PeerFrame] | None = None

    def fail(self, error: PeerError) -> PeerError:
        """Of no use from now on; whoever waits for its reply hears why."""
        self.failed = self.failed or error
        if self.reply and not self.reply.done():
            self.reply.set_exception(error)
        return error


class OpenRoute:
    """Streams to the peers of a route. Whatever waits for a peer raises PeerError once any of them has failed."""

    def __init__(self, channels: Channels, options: SessionOptions) -> None:
        self.session_id = secrets.token_bytes(16)
        self.legs: list[Leg] = []
        self.epoch = 0
        self._channels = channels
        self._options = options
        self._results: asyncio.Queue[pb.Result | None] = asyncio.Queue()
        self._patience_s = options.step_timeout_s

    @property
    def max_rows(self) -> int:
        most = min(leg.max_rows for leg in self.legs)
        if head := self._options.head:
            width = self.legs[0].stop.peer.hidden_size
            most = min(most, head.most_rows(row_bytes(self._options.codec, width)))
        return most

    @property
    def max_nodes(self) -> int:
        """Rows of a tree below row 0; none where a peer knows no trees."""
        if not all("tree" in leg.features for leg in self.legs):
            return 0
        return min(self.max_rows - 1, *(leg.max_nodes for leg in self.legs))

    async def open(self, route: Route, fork_of: bytes = b"") -> None:
        """Reserve on every peer and join the links, or release all and raise PeerError."""
        self.epoch += 1
        self.legs = [self._leg(stop) for stop in route]
        try:
            await _all(self._open(leg, OPEN_TIMEOUT_S, fork_of=fork_of) for leg in self.legs)
            await self._link(OPEN_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.settle()

    async def change(self, route: Route, standpoint: Standpoint) -> None:
        """Go over to `route`: who stays goes back to where the session stands, newcomers get what they lack.

        Raises PeerError; the legs that have not failed then can be changed again.
        """
        self.epoch += 1
        wanted = {stop.key for stop in route}
        staying = {leg.stop.key: leg for leg in self.legs if not leg.failed and leg.stop.key in wanted}
        for leg in self.legs:
            if staying.get(leg.stop.key) is not leg:
                leg.stream.close()
        self.legs = [staying.get(stop.key) or self._leg(stop) for stop in route]
        while untold := [(leg, word) for leg, word in self._words(standpoint) if leg.told != word]:
            await _all(self._tell(leg, word) for leg, word in untold)
        # What the peers said before they heard of the new route concerns nobody any more.
        self._results = asyncio.Queue()
        await self._link(CHANGE_TIMEOUT_S)
        if not self.legs[0].whole:
            await self._replay(standpoint)

    def settle(self) -> None:
        """A step went through the whole route: every peer has all rows."""
        for leg in self.legs:
            leg.whole = True
        self._patience_s = self._options.step_timeout_s

    def close(self) -> None:
        for leg in self.legs:
            leg.stream.close()

    # Steps.

    async def send(self, leg: Leg, frame: pb.ClientFrame) -> None:
        try:
            await leg.stream.send(frame)
        except PeerError as error:
            raise leg.fail(error) from None

    async def result(self) -> pb.Result:
        """The next part of an answer."""
        while True:
            if self._results.empty():  # an answer that is here is good, whoever failed since
                self._raise_failure()
            try:
                result = await asyncio.wait_for(self._results.get(), self._patience_s)
            except asyncio.TimeoutError:
                raise PeerError("route", grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time") from None
            if result is not None:
                return result

    def _raise_failure(self) -> None:
        for leg in self.legs:
            if leg.failed:
                raise leg.failed

    # Opening, linking, replaying.

    def _leg(self, stop: Stop) -> Leg:
        stream = PeerStream(stop.name, stop.peer.peer_id, self._channels.to(stop.peer), self._deliver)
        return Leg(stop, stream)

    async def _open(self, leg: Leg, timeout: float, *, fork_of: bytes = b"", resume: pb.Resume | None = None) -> None:
        stop, options = leg.stop, self._options
        message = pb.Open(
            session_id=self.session_id,
            client_id=self._channels.trust.client_id,
            protocol=PROTOCOL,
            required_features=[*(["exact"] if options.exact else []), *(["embeddings"] if options.head else [])],
            model_digest=stop.peer.model_digest,
            start=stop.blocks.start,
            end=stop.blocks.stop,
            reserve_tokens=options.reserve_tokens,
            codec=options.codec,
            route_epoch=self.epoch,
            fork_of=fork_of,
            exact=options.exact,
            priority=options.priority,
            resume=resume,
            hello=self._channels.trust.hello(stop.peer, self.session_id),
            revocations=self._channels.trust.revocations,
        )
        try:
            opened = await leg.stream.open(message, timeout)
        except PeerError as error:
            raise leg.fail(error) from None
        self._channels.trust.learn(opened.revocations)
        leg.token, leg.max_rows, leg.features = opened.link_token, opened.max_rows, frozenset(opened.features)
        leg.max_nodes = opened.max_nodes if opened.HasField("max_nodes") else opened.max_rows - 1

    def _words(self, standpoint: Standpoint) -> list[tuple[Leg, pb.Resume]]:
        """What each peer must hear: where the session stands, who gets a replay, who sends one."""
        following = [leg.whole for leg in self.legs[1:]] + [True]
        return [
            (
                leg,
                pb.Resume(
                    route_epoch=self.epoch,
                    step=standpoint.step,
                    length=len(standpoint.ids),
                    commit=standpoint.commit,
                    replayed=not leg.whole,
                    replay=not next_whole,
                ),
            )
            for leg, next_whole in zip(self.legs, following, strict=True)
        ]

    async def _tell(self, leg: Leg, word: pb.Resume) -> None:
        leg.told = word
        if not leg.max_rows:
            await self._open(leg, CHANGE_TIMEOUT_S, resume=word)
            return
        reply = await self._ask(leg, pb.ClientFrame(resume=word), leg, CHANGE_TIMEOUT_S)
        leg.token = reply.resumed.link_token
        if reply.resumed.log_lost:
            leg.whole = False

    async def _link(self, timeout: float) -> None:
        """Let each peer dial the next one, with the token that the next one gave out."""
        await _all(
            self._ask(
                leg,
                pb.ClientFrame(
                    link_to=pb.LinkTo(peer_id=after.stop.peer.peer_id, token=after.token, route_epoch=self.epoch)
                ),
                after,
                timeout,
            )
            for leg, after in pairwise(self.legs)
        )
        self._raise_failure()

    async def _replay(self, standpoint: Standpoint) -> None:
        """Give the head the tokens again; the replay flows on as far as peers lack rows."""
        head, rows = self.legs[0], min(REPLAY_ROWS, self.max_rows)
        starts = range(0, len(standpoint.ids), rows)
        self._patience_s = self._options.step_timeout_s * (1 + len(starts))
        for start in starts:
            chunk = standpoint.ids[start : start + rows]
            step = pb.Step(
                step=standpoint.step, route_epoch=self.epoch, base=start, ids=chunk, prefill=True, replay=True
            )
            if self._options.head:
                await self._options.head.embed(step, self._options.codec)
            await self.send(head, pb.ClientFrame(step=step))

    async def _ask(self, leg: Leg, frame: pb.ClientFrame, blamed: Leg, timeout: float) -> pb.PeerFrame:
        """Send a frame that the peer answers; `blamed` is who failed where no answer comes."""
        leg.reply = reply = asyncio.get_running_loop().create_future()
        try:
            await self.send(leg, frame)
            return await asyncio.wait_for(reply, timeout)
        except asyncio.TimeoutError:
            raise blamed.fail(blamed.stream.error(grpc.StatusCode.UNAVAILABLE, "did not answer in time")) from None
        finally:
            leg.reply = None
            if not (reply.cancel() or reply.cancelled()):
                reply.exception()  # where the sending failed it is known already, and asyncio shall not complain

    # Frames from peers.

    def _deliver(self, stream: PeerStream, frame: pb.PeerFrame | PeerError) -> None:
        leg = next((leg for leg in self.legs if leg.stream is stream), None)
        if leg is None:
            return
        if isinstance(frame, PeerError):
            self._failed(leg, frame)
        elif frame.HasField("result"):
            self._results.put_nowait(frame.result)
        elif frame.HasField("draining"):
            leg.draining = True
        elif frame.HasField("fault"):
            self._fault(leg, frame.fault)
        elif leg.reply and not leg.reply.done():
            leg.reply.set_result(frame)

    def _fault(self, leg: Leg, fault: pb.Fault) -> None:
        """A peer cannot reach the next one, whatever we hear from that one ourselves."""
        if fault.route_epoch < self.epoch:
            return
        lost = next((other for other in self.legs if other.stop.peer.peer_id == fault.peer_id), leg)
        reason = f"peer {leg.stop.name} cannot reach it: {fault.reason}"
        error = lost.stream.error(grpc.StatusCode.UNAVAILABLE, reason)
        if leg.reply and not leg.reply.done():
            leg.reply.set_exception(error)
        self._failed(lost, error)

    def _failed(self, leg: Leg, error: PeerError) -> None:
        leg.fail(error)
        self._results.put_nowait(None)


async def _all(work: Iterable[Work[Any, Any, Any]]) -> None:
    """Do all of it, side by side, to the end; then raise the first error."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome
