"""The gRPC service of a peer: its clients' control streams, and the links between peers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
from google.protobuf.message import DecodeError

from ...protocol import petal_pb2 as pb
from ...protocol.grammar.checker import GrammarChecker
from ...protocol.petal_pb2_grpc import PeerServicer
from ...protocol.trust.trust import Trust
from ..session.session import PeerSession
from ..session.spec import SessionFailed, invalid
from .connections import Connections
from .links import Links, Resolve
from .open_checks import grammar_of
from .sessions import Sessions
from .streams import Writer, abort, first_of, run_until_one_ends, start_answering, unreadable


class PeerService(PeerServicer):
    """Streams in, and what they are about."""

    def __init__(
        self,
        sessions: Sessions,
        trust: Trust,
        resolve: Resolve,
        connections: Connections,
        grammars: GrammarChecker | None = None,
    ) -> None:
        self.sessions = sessions
        self._links = Links(sessions, trust, resolve, connections)
        self._connections = connections
        self._grammars = grammars

    def sweep(self) -> None:
        """Cut the streams of whoever is not trusted any more, on either side of this peer."""
        self._links.sweep()
        self.sessions.sweep()

    async def close(self) -> None:
        self.sessions.end()
        if self._grammars:
            await self._grammars.close()
        await self._links.close()

    async def Session(self, requests: AsyncIterator[pb.ClientFrame], context: grpc.aio.ServicerContext) -> None:
        writer = Writer(context)
        try:
            frame = await first_of(requests)
            if frame is None or not frame.HasField("open"):
                raise invalid("a session starts with an open frame")
            grammar = await grammar_of(self.sessions.info, frame.open, self._grammars)
            session = self.sessions.open(frame.open, context.auth_context(), writer, grammar)
        except SessionFailed as failure:
            await abort(context, failure)
            return
        try:
            await start_answering(context)
            work = (self._read(session, requests), writer.run(), writer.watch(), self._expire(session))
            with self._connections.serving(context.peer()):
                ended = await run_until_one_ends(*work, failed=session.failed)
        finally:
            # Also when the client vanished and gRPC cancels this handler: its pages are free at once.
            self.sessions.close(session)
            writer.close()
        if ended:
            await abort(context, ended)

    async def Link(self, requests: AsyncIterator[pb.LinkFrame], context: grpc.aio.ServicerContext) -> None:
        await self._links.serve(requests, context)

    async def _read(self, session: PeerSession, requests: AsyncIterator[pb.ClientFrame]) -> None:
        dialing: asyncio.Task[None] | None = None
        try:
            async for frame in requests:
                kind = frame.WhichOneof("kind")
                if kind == "step":
                    session.on_step(frame.step, frame.ByteSize())
                elif kind in ("link_to", "resume"):
                    if dialing:
                        dialing.cancel()  # the client has changed its mind
                    if kind == "link_to":
                        session.on_route(frame.link_to.route_epoch)
                        dialing = asyncio.create_task(self._links.dial(session, frame.link_to))
                    else:
                        session.on_resume(frame.resume)
                else:
                    raise invalid("after the open frame only resume, link_to and step frames follow")
        except DecodeError as error:
            raise unreadable() from error
        finally:
            if dialing:
                dialing.cancel()

    async def _expire(self, session: PeerSession) -> None:
        # A step only notes the time: it must not pay for waking a task.
        idle_s = self.sessions.info.idle_s
        while (left := idle_s - session.idle_s) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        raise SessionFailed(grpc.StatusCode.DEADLINE_EXCEEDED, f"the session was idle for {idle_s:g} s")
