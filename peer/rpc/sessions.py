"""The sessions of a peer: who may open one, which run, and how they end when the peer leaves."""

from __future__ import annotations

import asyncio
import hmac
import time

from ...protocol import petal_pb2 as pb
from ...protocol.grammar.grammar import GrammarMatcher
from ...protocol.trust.trust import AuthContext, Principal, Trust, TrustError, client_id_of
from ...protocol.wire.limits import ALL_ANSWER_BYTES, PROTOCOL, WINDOW_BYTES
from ..engine.engine import Engine
from ..engine.fair_queue import Tenant
from ..limits.admission import Admission
from ..limits.answers import in_the_way
from ..limits.quotas import Quotas, QuotaUsage, QuotaUsages
from ..limits.rates import Buckets, Rate
from ..limits.refused import Refused
from ..session.replay import ReplayBudget
from ..session.session import FrameWriter, PeerSession
from ..session.spec import SessionFailed, SessionSpec
from .open_checks import ServiceInfo, Status, check_former, check_open, check_parent, spec_of

# Of a peer that leaves, a session in which nothing happened for so long ends at once: its client resumes elsewhere.
DRAIN_IDLE_S = 3.0

_REVOKED = SessionFailed(Status.PERMISSION_DENIED, "your membership of this swarm was revoked or has run out")
_LEAVING = SessionFailed(Status.UNAVAILABLE, "this peer is shutting down")
_GAVE_WAY = SessionFailed(Status.ABORTED, "this session gave way to others; resume it where there is room")
_TOO_OFTEN = SessionFailed(Status.RESOURCE_EXHAUSTED, "you open sessions faster than this peer takes; retry in 2 s")
_UNREAD = SessionFailed(
    Status.RESOURCE_EXHAUSTED,
    "answers that nobody has read fill this peer's memory; read, ask for less, or retry in 2 s",
)
_OPENED_ANEW = SessionFailed(Status.ABORTED, "this session was opened anew on another stream")


class Sessions:
    """Those that run, by their ids. While `draining`, no other may be opened."""

    def __init__(
        self,
        info: ServiceInfo,
        engine: Engine,
        admission: Admission,
        trust: Trust,
        quotas: Quotas,
        rate: Rate,
    ) -> None:
        """`rate`: how often one identity may open sessions."""
        self.info = info
        self.draining = False
        self.replay_budget = ReplayBudget(info.replay_bytes)
        self._engine = engine
        self._admission = admission
        self._trust = trust
        self._usages = QuotaUsages(quotas)
        self._opens: Buckets[str] = Buckets(rate)
        self._running: dict[bytes, PeerSession] = {}

    def __len__(self) -> int:
        return len(self._running)

    def open(
        self, message: pb.Open, context: AuthContext, writer: FrameWriter, grammar: GrammarMatcher | None = None
    ) -> PeerSession:
        """Admit a session, and say so to its client. Raises SessionFailed."""
        if self.draining:
            raise SessionFailed(Status.UNAVAILABLE, "this peer is leaving and takes no new sessions")
        check_open(self.info, message)
        former = self._running.get(message.session_id)
        check_former(message, former)
        principal = self._client(message, context)
        parent = check_parent(message, self._running.get(message.fork_of)) if message.fork_of else None
        usage = self._usages.of(principal)
        spec = spec_of(self.info, message, usage.quota)
        if former:
            self.close(former)
            former.fail(_OPENED_ANEW)
        session = self._admit(message, spec, usage, parent, writer)
        try:
            if parent:
                session.adopt(parent)
            if message.HasField("resume"):
                session.start_behind(message.resume)
        except SessionFailed:
            self._release(spec, usage)
            raise
        tenant = Tenant(principal.name, principal.share, usage.weight, usage.quota.priority)
        forked = parent.key if parent else None
        self._engine.open(session.key, tenant, spec.codec, spec.blocks, message.priority, forked, grammar)
        self._running[spec.session_id] = session
        writer.put(pb.PeerFrame(opened=self._opened(session)))
        return session

    def linked(self, hello: pb.LinkHello, context: AuthContext) -> tuple[PeerSession, Principal]:
        """The session that a link is for, and the peer before it. Raises SessionFailed."""
        principal = self._principal(hello.hello, hello.session_id, context)
        self._trust.learn(hello.revocations)
        session = self._running.get(hello.session_id)
        # One answer for an unknown session and for a wrong token: ids cannot be probed.
        if session is None or not hmac.compare_digest(session.link_token, hello.token):
            raise SessionFailed(Status.PERMISSION_DENIED, "the link's token opens no session here")
        if hello.route_epoch != session.epoch:
            word = "over" if hello.route_epoch < session.epoch else "not announced"
            raise SessionFailed(
                Status.FAILED_PRECONDITION, f"route epoch {hello.route_epoch} is {word}; {session.epoch} is current"
            )
        return session, principal

    def close(self, session: PeerSession) -> None:
        """Free what a session holds."""
        session_id = session.spec.session_id
        if self._running.get(session_id) is session:  # else its client has opened it anew, in its place
            session.close()
            self._release(session.spec, session.usage)
            del self._running[session_id]

    async def drain(self, grace_s: float) -> None:
        """Take no new sessions, tell the clients, and wait up to `grace_s` seconds until theirs have moved or ended."""
        self.draining = True
        draining = pb.PeerFrame(draining=pb.Draining(grace_ms=int(grace_s * 1000)))
        for session in self._running.values():
            session.send(draining)
        deadline = time.monotonic() + grace_s
        while self._running and time.monotonic() < deadline:
            for session in self._running.values():
                if session.idle_s > DRAIN_IDLE_S:
                    session.fail(_LEAVING)
            await asyncio.sleep(0.05)

    def sweep(self) -> None:
        """End those of whoever is not trusted any more."""
        for session in self._running.values():
            if not self._trust.trusted(session.usage.principal.certificates):
                session.fail(_REVOKED)

    def end(self) -> None:
        """The peer leaves now."""
        for session in self._running.values():
            session.fail(_LEAVING)

    def _client(self, message: pb.Open, context: AuthContext) -> Principal:
        """Who opens a session; sessions belong to whoever can prove their client id."""
        self._trust.learn(message.revocations)
        principal = self._principal(message.hello, message.session_id, context)
        if message.client_id != client_id_of(principal.name):
            raise SessionFailed(Status.UNAUTHENTICATED, "client_id is not of the key that the caller has shown")
        if not self._opens.take(principal.name):
            raise _TOO_OFTEN
        return principal

    def _principal(self, hello: pb.Hello, session_id: bytes, context: AuthContext) -> Principal:
        try:
            return self._trust.principal(context, hello, session_id)
        except TrustError as error:
            raise SessionFailed(Status.UNAUTHENTICATED, str(error)) from None

    def _admit(
        self,
        message: pb.Open,
        spec: SessionSpec,
        usage: QuotaUsage,
        parent: PeerSession | None,
        writer: FrameWriter,
    ) -> PeerSession:
        try:
            self._reserve(spec, usage, parent)
        except Refused as error:
            code = Status.FAILED_PRECONDITION if error.final else Status.RESOURCE_EXHAUSTED
            raise SessionFailed(code, str(error)) from error
        return PeerSession(
            spec, usage, self._engine, self.replay_budget, message.route_epoch, writer, self._bound_answers
        )

    def _reserve(self, spec: SessionSpec, usage: QuotaUsage, parent: PeerSession | None) -> None:
        usage.open(spec.session_id, spec.reserve_tokens)
        share, weight = usage.principal.share, usage.weight
        try:
            try:
                self._admission.reserve(spec.session_id, spec.reserve_tokens, share, weight)
            except Refused as error:
                if error.final or not self._make_room(spec, share, parent):
                    raise
                self._admission.reserve(spec.session_id, spec.reserve_tokens, share, weight)
        except Refused:
            usage.close(spec.session_id)
            raise

    def _make_room(self, spec: SessionSpec, share: str, parent: PeerSession | None) -> bool:
        """End sessions that give way to this one; whether there is room now."""
        idle_s = {key: session.idle_s for key, session in self._running.items() if session is not parent}
        leaving = self._admission.giving_way(spec.reserve_tokens, share, idle_s)
        for session in [self._running[key] for key in leaving]:
            self.close(session)
            session.fail(_GAVE_WAY)
        return bool(leaving)

    def _bound_answers(self, asking: PeerSession) -> None:
        """End sessions where what all clients have not read would be too much."""
        owed = {session_id: session.owed for session_id, session in self._running.items()}
        for session_id in in_the_way(owed, asking.spec.session_id, ALL_ANSWER_BYTES):
            self._running[session_id].fail(_UNREAD)

    def _release(self, spec: SessionSpec, usage: QuotaUsage) -> None:
        self._admission.release(spec.session_id)
        usage.close(spec.session_id)

    def _opened(self, session: PeerSession) -> pb.Opened:
        return pb.Opened(
            link_token=session.link_token,
            window_bytes=WINDOW_BYTES,
            max_rows=session.spec.max_rows,
            protocol=PROTOCOL,
            features=sorted(self.info.features),
            revocations=self._trust.revocations,
            max_nodes=session.usage.quota.tree_nodes,
            rope_borders=self._engine.span.rope_borders,
        )
