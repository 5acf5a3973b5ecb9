"""Links between the peers of a route: those that peers before this one open, and those that it opens to next peers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from ...protocol import petal_pb2 as pb
from ...protocol.trust.channels import Channels
from ...protocol.trust.trust import Principal, Trust
from ...protocol.wire.limits import WINDOW_BYTES
from ..session.next_hop import LinkFailed
from ..session.session import PeerSession
from ..session.spec import SessionFailed, invalid
from .connections import Connections
from .sessions import Sessions
from .streams import Writer, abort, first_of, run_until_one_ends, start_answering, unreadable

# Finds a peer's record in this peer's own directory; None where it is not known. With `fresh` it asks the swarm anew.
Resolve = Callable[[str, bool], Awaitable[pb.PeerRecord | None]]


class Links:
    """Both kinds, and the channels to next peers."""

    def __init__(self, sessions: Sessions, trust: Trust, resolve: Resolve, connections: Connections) -> None:
        self._sessions = sessions
        self._trust = trust
        self._resolve = resolve
        self._connections = connections
        self._channels = Channels(trust)
        self._from: dict[asyncio.Task[Any], Principal] = {}

    async def serve(self, requests: AsyncIterator[pb.LinkFrame], context: grpc.aio.ServicerContext) -> None:
        """A link from the peer before, for as long as it lasts."""
        try:
            frame = await first_of(requests)
            if frame is None or not frame.HasField("hello"):
                raise invalid("a link starts with a hello")
            session, principal = self._sessions.linked(frame.hello, context.auth_context())
        except SessionFailed as failure:
            await abort(context, failure)
            return
        writer = Writer(context)
        writer.put(pb.LinkReply(linked=pb.Linked(route_epoch=session.epoch, window_bytes=WINDOW_BYTES)))

        def credit(size: int) -> None:
            writer.put(pb.LinkReply(credit=pb.Credit(bytes=size)))

        await start_answering(context)
        session.on_uplink(credit)
        link = asyncio.current_task()
        assert link
        self._from[link] = principal
        try:
            with self._connections.serving(context.peer()):
                ended = await run_until_one_ends(_read(session, requests), writer.run(), writer.watch())
        finally:
            del self._from[link]
        if ended:
            await abort(context, ended)

    async def dial(self, session: PeerSession, message: pb.LinkTo) -> None:
        """Dial the next peer at the address in its own signed record, never at one that a client names."""
        session_id = session.spec.session_id
        reason = "it is not in this peer's directory"
        tried: set[tuple[str, bytes]] = set()
        for fresh in (False, True):  # it may have come back with another address or TLS key
            record = await self._resolve(message.peer_id, fresh) or pb.PeerRecord()
            for address in record.addresses:
                if (address, record.certificates[0]) in tried:
                    continue
                tried.add((address, record.certificates[0]))
                hello = pb.LinkHello(
                    session_id=session_id,
                    token=message.token,
                    route_epoch=message.route_epoch,
                    hello=self._trust.hello(record, session_id),
                    revocations=self._trust.revocations,
                )
                try:
                    await session.next_hop.attach(message.peer_id, self._channels.to(record, address), hello)
                except LinkFailed as error:
                    reason = f"{address}: {error}"
                    continue
                session.send(pb.PeerFrame(linked=pb.Linked(route_epoch=message.route_epoch)))
                return
        fault = pb.Fault(peer_id=message.peer_id, reason=reason, route_epoch=message.route_epoch)
        session.send(pb.PeerFrame(fault=fault))

    def sweep(self) -> None:
        """Cut the links from and to whoever is not trusted any more."""
        self._channels.sweep()
        for link, principal in self._from.items():
            if not self._trust.trusted(principal.certificates):
                link.cancel()

    async def close(self) -> None:
        await self._channels.close()


async def _read(session: PeerSession, requests: AsyncIterator[pb.LinkFrame]) -> None:
    """Activations for a session, until its route is another. Raises SessionFailed; of a bad frame the session dies."""
    token = session.link_token
    try:
        async for frame in requests:
            if session.link_token != token:
                break
            if not frame.HasField("activations"):
                raise invalid("after the hello only activations follow on a link")
            session.on_activations(frame.activations, frame.ByteSize())
        else:
            return
    except DecodeError as error:
        session.fail(unreadable())
        raise unreadable() from error
    except SessionFailed as failure:
        session.fail(failure)
        raise
    raise SessionFailed(grpc.StatusCode.FAILED_PRECONDITION, "the route of this link is over")
