"""The gRPC service of a peer: opens sessions, joins links to them, ends both with a status and a sentence."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.petal_pb2_grpc import PeerServicer
from ...protocol.trust.channels import Channels
from ...protocol.trust.trust import Principal, Trust, TrustError, client_id_of
from ...protocol.wire.limits import MAX_ROWS, PROTOCOL, PROTOCOL_MIN, WINDOW_BYTES
from ..engine.engine import Engine
from ..engine.fair_queue import Tenant
from ..limits.admission import Admission, Refused
from ..limits.quotas import NO_QUOTAS, Quota, Quotas, QuotaUsage, QuotaUsages
from ..session.next_hop import LinkFailed
from ..session.replay import ReplayBudget
from ..session.session import PeerSession
from ..session.spec import SessionFailed, SessionSpec, invalid
from .streams import Writer, abort, failure_of, first_of, frames_of, start_answering

FEATURES = frozenset({"tree", "fork", "rewind", "resume", "logits", "hidden", "top_logprobs", "embeddings"})
Status = grpc.StatusCode
# Finds a peer's record in this peer's own directory; None where it is not known. With `fresh` it asks the swarm anew.
Resolve = Callable[[str, bool], Awaitable[pb.PeerRecord | None]]
# Of a peer that leaves, a session in which nothing happened for so long ends at once: its client resumes elsewhere.
DRAIN_IDLE_S = 3.0


@dataclass(frozen=True)
class ServiceInfo:
    """What this peer serves."""

    peer_id: str
    model: str
    model_digest: bytes
    start: int
    end: int
    n_blocks: int
    hidden_size: int
    vocab_size: int
    context_length: int
    features: frozenset[str] = FEATURES
    idle_s: float = 600.0
    replay_bytes: int = 1 << 30


_REVOKED = SessionFailed(Status.PERMISSION_DENIED, "your membership of this swarm was revoked or has run out")
_LEAVING = SessionFailed(Status.UNAVAILABLE, "this peer is shutting down")


class PeerService(PeerServicer):
    """Sessions and links of one peer."""

    def __init__(
        self,
        info: ServiceInfo,
        engine: Engine,
        admission: Admission,
        trust: Trust,
        resolve: Resolve,
        quotas: Quotas = NO_QUOTAS,
    ) -> None:
        self.info = info
        self.draining = False
        self._engine = engine
        self._admission = admission
        self._resolve = resolve
        self.replay_budget = ReplayBudget(info.replay_bytes)
        self._sessions: dict[bytes, PeerSession] = {}
        self._uplinks: dict[asyncio.Task[Any], Principal] = {}
        self._trust = trust
        self._channels = Channels(trust)
        self._usages = QuotaUsages(quotas)

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    async def drain(self, grace_s: float) -> None:
        """Take no new sessions, tell the clients, and wait up to `grace_s` seconds until theirs have moved or ended."""
        self.draining = True
        draining = pb.PeerFrame(draining=pb.Draining(grace_ms=int(grace_s * 1000)))
        for session in self._sessions.values():
            session.send(draining)
        deadline = time.monotonic() + grace_s
        while self._sessions and time.monotonic() < deadline:
            for session in self._sessions.values():
                if session.idle_s > DRAIN_IDLE_S:
                    session.fail(_LEAVING)
            await asyncio.sleep(0.05)

    def sweep(self) -> None:
        """Cut the streams of whoever is not trusted any more, on either side of this peer."""
        self._channels.sweep()
        for session in self._sessions.values():
            if not self._trust.trusted(session.usage.principal.certificates):
                session.fail(_REVOKED)
        for link, principal in self._uplinks.items():
            if not self._trust.trusted(principal.certificates):
                link.cancel()

    async def close(self) -> None:
        for session in self._sessions.values():
            session.fail(_LEAVING)
        await self._channels.close()

    # A client's control stream.

    async def Session(self, requests: AsyncIterator[pb.ClientFrame], context: grpc.aio.ServicerContext) -> None:
        writer = Writer(context)
        requests = frames_of(requests)
        try:
            session = await self._open(requests, writer, context)
        except SessionFailed as failure:
            await abort(context, failure)
            return
        await start_answering(context)
        work = (self._read(session, requests, writer), writer.run(), writer.watch(), self._expire(session))
        tasks = [asyncio.ensure_future(part) for part in work]
        try:
            watched: list[asyncio.Future[Any]] = [session.failed, *tasks]
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            ended = session.failed.result() if session.failed.done() else failure_of(tasks)
        finally:
            # Also when the client vanished and gRPC cancels this handler: its pages are free at once.
            for task in tasks:
                task.cancel()
            self._close(session)
        if ended:
            await abort(context, ended)

    async def _open(
        self, requests: AsyncIterator[pb.ClientFrame], writer: Writer, context: grpc.aio.ServicerContext
    ) -> PeerSession:
        frame = await first_of(requests)
        if frame is None or not frame.HasField("open"):
            raise invalid("a session starts with an open frame")
        message = frame.open
        self._check_open(message)
        principal = self._client(message, context)
        parent = self._parent(message)
        usage = self._usages.of(principal)
        spec = self._spec(message, usage.quota)
        if former := self._sessions.get(spec.session_id):
            self._close(former)
            former.fail(SessionFailed(Status.ABORTED, "this session was opened anew on another stream"))
        try:
            self._reserve(spec, usage)
        except Refused as error:
            code = Status.FAILED_PRECONDITION if error.final else Status.RESOURCE_EXHAUSTED
            raise SessionFailed(code, str(error)) from error
        session = PeerSession(spec, usage, self._engine, self.replay_budget, message.route_epoch, writer.put)
        try:
            if parent:
                session.adopt(parent)
            if message.HasField("resume"):
                session.start_behind(message.resume)
        except SessionFailed:
            self._release(session)
            raise
        tenant = Tenant(principal.name, principal.share, usage.weight, usage.quota.priority)
        self._engine.open(
            session.key, tenant, spec.codec, spec.blocks, message.priority, parent.key if parent else None
        )
        self._sessions[spec.session_id] = session
        opened = pb.Opened(
            link_token=session.link_token,
            window_bytes=WINDOW_BYTES,
            max_rows=spec.max_rows,
            protocol=PROTOCOL,
            features=sorted(self.info.features),
            revocations=self._trust.revocations,
            max_nodes=usage.quota.tree_nodes,
        )
        writer.put(pb.PeerFrame(opened=opened))
        return session

    def _check_open(self, message: pb.Open) -> None:
        info = self.info
        if self.draining:
            raise SessionFailed(Status.UNAVAILABLE, "this peer is leaving and takes no new sessions")
        if not PROTOCOL_MIN <= message.protocol <= PROTOCOL:
            raise SessionFailed(
                Status.FAILED_PRECONDITION,
                f"protocol {message.protocol} is not spoken here; {PROTOCOL_MIN} to {PROTOCOL} are",
            )
        if unknown := sorted(set(message.required_features) - info.features):
            raise SessionFailed(Status.UNIMPLEMENTED, f"this peer does not know the required feature {unknown[0]!r}")
        if message.model_digest != info.model_digest:
            raise SessionFailed(
                Status.NOT_FOUND, f"this peer serves {info.model} ({info.model_digest.hex()[:16]}), not that model"
            )
        if not info.start <= message.start < message.end <= info.end:
            raise SessionFailed(
                Status.NOT_FOUND,
                f"this peer hosts blocks {info.start}:{info.end}, not {message.start}:{message.end}",
            )
        if len(message.session_id) != 16 or len(message.client_id) != 16:
            raise invalid("session_id and client_id are 16 bytes each")
        if (former := self._sessions.get(message.session_id)) and not _replaces(message, former):
            raise SessionFailed(Status.ALREADY_EXISTS, "that session id is taken; choose 16 random bytes")
        if message.fork_of and message.HasField("resume"):
            raise invalid("a session forks or resumes, not both")
        if message.codec not in (pb.FLOAT32, pb.BF16, pb.INT8):
            raise invalid("codec is none of float32, bf16, int8")
        if not 0 < message.reserve_tokens <= info.context_length + 4096:
            raise invalid(f"reserve_tokens is {message.reserve_tokens}; the context is {info.context_length}")
        for name in ("adapter_id", "block_prompts"):
            if getattr(message, name):
                raise SessionFailed(Status.UNIMPLEMENTED, f"this peer does not serve {name} yet")

    def _client(self, message: pb.Open, context: grpc.aio.ServicerContext) -> Principal:
        """Who opens a session; sessions belong to whoever can prove their client id."""
        self._trust.learn(message.revocations)
        principal = self._principal(context, message.hello, message.session_id)
        if message.client_id != client_id_of(principal.name):
            raise SessionFailed(Status.UNAUTHENTICATED, "client_id is not of the key that the caller has shown")
        return principal

    def _principal(self, context: grpc.aio.ServicerContext, hello: pb.Hello, session_id: bytes) -> Principal:
        try:
            return self._trust.principal(context.auth_context(), hello, session_id)
        except TrustError as error:
            raise SessionFailed(Status.UNAUTHENTICATED, str(error)) from None

    def _parent(self, message: pb.Open) -> PeerSession | None:
        if not message.fork_of:
            return None
        parent = self._sessions.get(message.fork_of)
        # One answer for an unknown session and for another client's: ids cannot be probed.
        if parent is None or not hmac.compare_digest(parent.spec.client_id, message.client_id):
            raise SessionFailed(Status.NOT_FOUND, "there is no session of yours to fork by that id")
        if (parent.spec.codec, parent.spec.blocks) != (message.codec, range(message.start, message.end)):
            raise invalid("a fork keeps its parent's codec and blocks")
        if message.reserve_tokens < parent.spec.reserve_tokens:
            raise invalid(f"a fork reserves at least what its parent did, {parent.spec.reserve_tokens} tokens")
        return parent

    def _spec(self, message: pb.Open, quota: Quota) -> SessionSpec:
        info = self.info
        return SessionSpec(
            session_id=message.session_id,
            client_id=message.client_id,
            codec=message.codec,
            reserve_tokens=message.reserve_tokens,
            context_length=info.context_length,
            hidden_size=info.hidden_size,
            vocab_size=info.vocab_size,
            blocks=range(message.start, message.end),
            n_blocks=info.n_blocks,
            peer_id=info.peer_id,
            max_nodes=MAX_ROWS - 1 if quota.tree_nodes is None else quota.tree_nodes,
        )

    async def _read(self, session: PeerSession, requests: AsyncIterator[pb.ClientFrame], writer: Writer) -> None:
        dialing: asyncio.Task[None] | None = None
        try:
            async for frame in requests:
                kind = frame.WhichOneof("kind")
                if kind == "step":
                    session.on_step(frame.step, frame.ByteSize())
                elif kind == "route":
                    session.on_route(frame.route.route_epoch)
                elif kind in ("link_to", "resume"):
                    if dialing:
                        dialing.cancel()  # the client has changed its mind
                    if kind == "link_to":
                        session.on_route(frame.link_to.route_epoch)
                        dialing = asyncio.create_task(self._link(session, frame.link_to, writer))
                    else:
                        session.on_resume(frame.resume)
                else:
                    raise invalid("after the open frame only resume, link_to, step and route frames follow")
        finally:
            if dialing:
                dialing.cancel()

    async def _link(self, session: PeerSession, message: pb.LinkTo, writer: Writer) -> None:
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
                writer.put(pb.PeerFrame(linked=pb.Linked(route_epoch=message.route_epoch)))
                return
        fault = pb.Fault(peer_id=message.peer_id, reason=reason, route_epoch=message.route_epoch)
        writer.put(pb.PeerFrame(fault=fault))

    async def _expire(self, session: PeerSession) -> None:
        # A step only notes the time: it must not pay for waking a task.
        while (left := self.info.idle_s - session.idle_s) > 0:  # noqa: ASYNC110
            await asyncio.sleep(left)
        raise SessionFailed(Status.DEADLINE_EXCEEDED, f"the session was idle for {self.info.idle_s:g} s")

    def _close(self, session: PeerSession) -> None:
        session_id = session.spec.session_id
        if self._sessions.get(session_id) is session:  # else its client has opened it anew, in its place
            session.close()
            self._release(session)
            del self._sessions[session_id]

    def _reserve(self, spec: SessionSpec, usage: QuotaUsage) -> None:
        usage.open(spec.session_id, spec.reserve_tokens)
        try:
            share, weight = usage.principal.share, usage.weight
            self._admission.reserve(spec.session_id, spec.reserve_tokens, share, weight)
        except Refused:
            usage.close(spec.session_id)
            raise

    def _release(self, session: PeerSession) -> None:
        self._admission.release(session.spec.session_id)
        session.usage.close(session.spec.session_id)

    # The link from the peer before.

    async def Link(self, requests: AsyncIterator[pb.LinkFrame], context: grpc.aio.ServicerContext) -> None:
        requests = frames_of(requests)
        try:
            session, principal = await self._linked_session(requests, context)
        except SessionFailed as failure:
            await abort(context, failure)
            return
        writer = Writer(context)
        writer.put(pb.LinkReply(linked=pb.Linked(route_epoch=session.epoch, window_bytes=WINDOW_BYTES)))

        def credit(size: int) -> None:
            writer.put(pb.LinkReply(credit=pb.Credit(bytes=size)))

        await start_answering(context)
        session.on_uplink(credit)
        work = (_read_link(session, requests), writer.run(), writer.watch())
        tasks = [asyncio.ensure_future(part) for part in work]
        link = asyncio.current_task()
        assert link
        self._uplinks[link] = principal
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            ended = failure_of(tasks)
        finally:
            for task in tasks:
                task.cancel()
            del self._uplinks[link]
        if ended:
            await abort(context, ended)

    async def _linked_session(
        self, requests: AsyncIterator[pb.LinkFrame], context: grpc.aio.ServicerContext
    ) -> tuple[PeerSession, Principal]:
        frame = await first_of(requests)
        if frame is None or not frame.HasField("hello"):
            raise invalid("a link starts with a hello")
        hello = frame.hello
        principal = self._principal(context, hello.hello, hello.session_id)
        self._trust.learn(hello.revocations)
        session = self._sessions.get(hello.session_id)
        # One answer for an unknown session and for a wrong token: ids cannot be probed.
        if session is None or not hmac.compare_digest(session.link_token, hello.token):
            raise SessionFailed(Status.PERMISSION_DENIED, "the link's token opens no session here")
        if hello.route_epoch != session.epoch:
            word = "over" if hello.route_epoch < session.epoch else "not announced"
            raise SessionFailed(
                Status.FAILED_PRECONDITION, f"route epoch {hello.route_epoch} is {word}; {session.epoch} is current"
            )
        return session, principal


async def _read_link(session: PeerSession, requests: AsyncIterator[pb.LinkFrame]) -> None:
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
    except SessionFailed as failure:
        session.fail(failure)
        raise
    raise SessionFailed(Status.FAILED_PRECONDITION, "the route of this link is over")


def _replaces(message: pb.Open, former: PeerSession) -> bool:
    """Whether a client opens its own session anew: its stream broke, which this peer may not have noticed yet."""
    return hmac.compare_digest(former.spec.client_id, message.client_id) and message.route_epoch > former.epoch
