"""A peer's side of one session: frames become steps, steps become answers; going back where the route changed.

Lives on the event loop and never blocks. Steps come in from the client (head and tail) and from the peer before;
results go to the next peer, or to the client.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable, Iterator

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.wire.limits import UNREAD_BYTES, WINDOW_BYTES
from ...protocol.wire.step import StepHeader
from ..engine.engine import Engine
from ..engine.step import BadStep, DeadlinePassed, StepFailed, StepInput, StepOutput
from ..limits.admission import Refused
from ..limits.quotas import QuotaUsage
from .frames import link_frames, replay_frames, result_frames
from .next_hop import NextHop
from .replay import ReplayBudget, ReplayLog
from .spec import SessionFailed, SessionSpec, invalid
from .state import Entry, Ledger, Rows
from .step_parts import ClientPart, LinkPart

_STATUS = {
    BadStep: grpc.StatusCode.INVALID_ARGUMENT,
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class PeerSession:
    """One session on this peer. `send` hands frames to the client; `failed` is set when the session must end."""

    def __init__(
        self,
        spec: SessionSpec,
        usage: QuotaUsage,
        engine: Engine,
        budget: ReplayBudget,
        epoch: int,
        send: Callable[[pb.PeerFrame], int],
    ) -> None:
        self.spec = spec
        self.usage = usage
        # The engine's name for it: a session that is opened anew shares nothing with the one before.
        self.key = secrets.token_bytes(16)
        self.link_token = secrets.token_bytes(16)
        self.epoch = epoch
        self.failed: asyncio.Future[SessionFailed] = asyncio.get_running_loop().create_future()
        self.next_hop = NextHop(self._link_fault)
        self.ledger = Ledger(spec)
        self.send = send
        self._last_used = time.monotonic()
        self._running = 0
        self._credit_upstream: Callable[[int], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        # What the tail says goes to the client alone, who has it.
        self._log = None if spec.is_tail else ReplayLog(spec.row_bytes, budget)
        self._resuming: pb.Resume | None = None
        self._passes_replay_on = False
        self._client_part: dict[int, ClientPart] = {}
        self._link_part: dict[int, LinkPart] = {}
        self._outstanding = {"client": 0, "link": 0}
        self._owed = {"client": 0, "link": 0}

    @property
    def idle_s(self) -> float:
        """Seconds since anything happened."""
        return 0.0 if self._running else time.monotonic() - self._last_used

    # Frames from the client and from the peer before.

    def on_step(self, message: pb.Step, size: int) -> None:
        """A step on the client's own stream. Raises SessionFailed."""
        if not (self.spec.is_head or self.spec.is_tail):
            raise invalid("steps go to the head and the tail peer; this peer is neither")
        self._take_credit("client", size)
        if not self._current(message.route_epoch):
            return
        part = ClientPart.of(message, self.spec)
        if part.header.replay:
            if not self.spec.is_head:
                raise invalid("a client replays to the head peer only")
            self._replay(part.header, part.ids, bytearray(part.embeddings))
            return
        self._check_order(part.header.step, self._client_part)
        self._client_part[part.header.step] = part
        self._join(part.header.step)

    def on_activations(self, message: pb.Activations, size: int) -> None:
        """Part of a step on the link from the peer before. Raises SessionFailed."""
        if self.spec.is_head:
            raise invalid("the head peer takes no activations")
        self._take_credit("link", size)
        if not self._current(message.route_epoch):
            return
        if self.spec.is_tail and not message.replay and message.step <= self.ledger.step:
            return  # a repeat, which the client's word drives here
        part = self._link_part.get(message.step) or LinkPart.of(message, self.spec)
        part.add(message.hidden)
        if part.header.replay:
            if not part.whole:
                raise invalid("replayed rows come in frames of whole rows")
            self._replay(part.header, (), part.hidden)
            return
        self._check_order(part.header.step, self._link_part)
        self._link_part[message.step] = part
        if part.whole:
            self._join(message.step)

    def on_route(self, epoch: int) -> None:
        """The client changed its route: frames of older epochs are dropped from now on."""
        if epoch < self.epoch:
            raise invalid(f"route epoch {epoch} is older than {self.epoch}; epochs only rise")
        if epoch > self.epoch:
            # Parts of the old route never become whole; the new one sends those steps again.
            self._link_part.clear()
        self.epoch = epoch

    def on_resume(self, message: pb.Resume) -> None:
        """Go back to where the client stands; `Resumed` tells it once the compute thread has. Raises SessionFailed."""
        self.on_route(message.route_epoch)
        if message.step > self.ledger.step:
            raise invalid(f"cannot resume behind step {message.step}: step {self.ledger.step} is the newest")
        self._last_used = time.monotonic()
        self._client_part.clear()
        self._link_part.clear()
        self.next_hop.restart(iter(()))
        self.link_token = secrets.token_bytes(16)
        self._resuming = message

        def done(refusal: str) -> None:
            self._loop.call_soon_threadsafe(self._resumed, message, refusal)

        kept = 0 if message.replayed else message.length
        self._engine.resume(self.key, kept, tuple(message.commit), done)

    def on_uplink(self, credit: Callable[[int], None]) -> None:
        """The peer before has linked up; `credit` gives it bytes back."""
        self._credit_upstream = credit
        self._outstanding["link"] = self._owed["link"] = 0

    def start_behind(self, message: pb.Resume) -> None:
        """Take another peer's place: its rows come as a replay. Raises SessionFailed."""
        if message.length > self.spec.reserve_tokens:
            raise invalid(f"{message.length} rows to replay, but only {self.spec.reserve_tokens} are reserved")
        self._passes_replay_on = message.replay
        self.ledger.resume(message.step, message.length, missing=message.length)

    def adopt(self, parent: PeerSession) -> None:
        """Start as a fork of a session of the same client. Raises SessionFailed."""
        self.ledger.adopt(parent.ledger)
        self._log = parent._log and parent._log.fork()

    def close(self) -> None:
        self._engine.close(self.key)
        self.next_hop.close()
        if self._log:
            self._log.lose()

    def fail(self, failure: SessionFailed) -> None:
        if not self.failed.done():
            self.failed.set_result(failure)

    # Checks.

    def _current(self, epoch: int) -> bool:
        if epoch > self.epoch:
            raise invalid(f"route epoch {epoch} was not announced; this session is at {self.epoch}")
        if epoch == self.epoch and self._resuming:
            raise invalid("steps wait for the resumed frame")
        return epoch == self.epoch

    def _check_order(self, step: int, waiting: Iterable[int]) -> None:
        """On one stream no step is left out, else what never becomes whole would pile up."""
        expected = max(self.ledger.step, *waiting, 0) + 1
        if step > expected:
            raise invalid(f"step {step} is ahead; step {expected} comes next")

    def _take_credit(self, side: str, size: int) -> None:
        self._last_used = time.monotonic()
        self._outstanding[side] += size
        if self._outstanding[side] > WINDOW_BYTES:
            raise SessionFailed(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._outstanding[side]} bytes of steps are outstanding; the window is {WINDOW_BYTES}",
            )
        self._owed[side] += size

    # A whole step.

    def _join(self, step: int) -> None:
        """Accept the step once every stream that carries a part of it has brought it."""
        from_client, from_link = self._client_part.get(step), self._link_part.get(step)
        needs_client = self.spec.is_head or self.spec.is_tail
        if step <= self.ledger.step:
            # A repeat: the client's word drives it at head and tail, the link's elsewhere.
            self._forget(step)
            if driver := from_client if needs_client else from_link:
                self._accept(driver.header, driver.rows)
            return
        if (needs_client and not from_client) or (not self.spec.is_head and not (from_link and from_link.whole)):
            return
        self._forget(step)
        if from_client and from_link and from_client.header.content != from_link.header.content:
            raise invalid(f"step {step} differs between the client's stream and the link")
        part = from_client or from_link
        assert part is not None
        if entry := self._accept(part.header, part.rows):
            self._spend(part.header.rows)
            self._submit(entry, from_client, from_link, time.monotonic_ns())

    def _spend(self, tokens: int) -> None:
        try:
            self.usage.spend(tokens)
        except Refused as error:
            raise SessionFailed(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None

    def _forget(self, step: int) -> None:
        self._client_part.pop(step, None)
        self._link_part.pop(step, None)

    def _accept(self, header: StepHeader, rows: Rows) -> Entry | None:
        """The new step, if it is one; a repeat gets its answer again. Raises SessionFailed."""
        entry = self.ledger.accept(header, rows)
        if entry is None and self.ledger.newest:
            self._answer(self.ledger.newest)
        return entry

    def _submit(
        self, entry: Entry, from_client: ClientPart | None, from_link: LinkPart | None, received_ns: int
    ) -> None:
        header = entry.header
        hidden = from_link.hidden if from_link else bytearray(from_client.embeddings if from_client else b"")
        step = StepInput(
            ids=from_client.ids if from_client else (),
            hidden=hidden,
            parents=header.parents,
            base=header.base,
            commit=header.commit or None,
            rewind=header.rewind,
            prefill=header.prefill,
            sample=header.sample,
            sampling=from_client.sampling if from_client else None,
            history=from_client.history if from_client else None,
            top_logprobs=header.top_logprobs,
            want_logits=header.want_logits,
            want_hidden=header.want_hidden,
            deadline=time.monotonic() + header.deadline_ms / 1000 if header.deadline_ms else None,
        )
        hops = from_link.hops if from_link else []
        self._run(step, lambda output: self._finished(entry, output, hops, received_ns))

    def _replay(self, header: StepHeader, ids: tuple[int, ...], hidden: bytearray) -> None:
        """Compute rows that another peer had computed before. Raises SessionFailed."""
        self.ledger.replay(header)
        step = StepInput(ids, hidden, header.parents, header.base, commit=None, rewind=None, prefill=True, sample=False)
        self._run(step, lambda output: self._replayed(header, output))

    def _run(self, step: StepInput, finished: Callable[[StepOutput], None]) -> None:
        """`finished` hears of the output on the event loop, unless a resumption undid the step."""

        def done(result: StepOutput | StepFailed) -> None:
            self._loop.call_soon_threadsafe(hand_over, result)

        def hand_over(result: StepOutput | StepFailed) -> None:
            if self._resuming:
                return
            self._running -= 1
            self._last_used = time.monotonic()
            if isinstance(result, StepFailed):
                self.fail(SessionFailed(_STATUS.get(type(result), grpc.StatusCode.INTERNAL), str(result)))
                return
            finished(result)
            self._return_credit()

        self._running += 1
        self._engine.submit(self.key, step, done)

    # Results.

    def _finished(self, entry: Entry, output: StepOutput, hops: list[pb.Hop], received_ns: int) -> None:
        header = entry.header
        if header.trace:
            hop = pb.Hop(
                peer_id=self.spec.peer_id,
                received_ns=received_ns,
                start_ns=output.started_ns,
                end_ns=output.ended_ns,
                queue_ns=output.queued_ns,
            )
            hops = [*hops, hop]
        entry.finished = True
        if self._log:
            self._log.settle(header.commit, header.rewind)
            (self._log.append if header.prefill else self._log.hold)(output.hidden)
        entry.answer = (
            result_frames(header, output, hops) if self.spec.is_tail else link_frames(header, output.hidden, hops)
        )
        self._answer(entry)

    def _replayed(self, header: StepHeader, output: StepOutput) -> None:
        if self._log:
            self._log.append(output.hidden)
        if self._passes_replay_on:
            for frame in self._replay_frames(header.step, header.base, [output.hidden]):
                self.next_hop.send(frame)

    def _replay_frames(self, step: int, base: int, chunks: Iterable[bytes]) -> Iterator[pb.LinkFrame]:
        return replay_frames(step, self.epoch, base, chunks, self.spec.row_bytes)

    def _resumed(self, message: pb.Resume, refusal: str) -> None:
        """The compute thread went back; nothing of later steps comes from it any more."""
        if message is not self._resuming:
            return  # the client went on to another route meanwhile
        if refusal:
            self.fail(SessionFailed(grpc.StatusCode.ABORTED, refusal))
            return
        self._resuming = None
        self._running = 0
        self.ledger.resume(message.step, message.length, missing=message.length if message.replayed else 0)
        self._passes_replay_on = message.replay and message.replayed
        if self._log and message.replayed:
            self._log.restart()
        elif self._log:
            self._log.resume(message.length, message.commit)
            if message.replay and not self._log.lost:
                self.next_hop.restart(self._replay_frames(message.step, 0, self._log.chunks))
        lost = message.replay and self._log is not None and self._log.lost
        resumed = pb.Resumed(route_epoch=message.route_epoch, link_token=self.link_token, log_lost=lost)
        self.send(pb.PeerFrame(resumed=resumed))

    def _answer(self, entry: Entry) -> None:
        """Send the step's answer, again where it is a repeat. What nobody takes must not pile up."""
        queued = 0
        for frame in entry.answer or ():
            if isinstance(frame, pb.PeerFrame):
                queued = self.send(frame)
            else:
                frame.activations.route_epoch = self.epoch
                queued = self.next_hop.send(frame)
        if queued > UNREAD_BYTES:
            self.fail(SessionFailed(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{queued} bytes of answers wait to be read"))

    def _return_credit(self) -> None:
        """Credit goes back in large pieces: a decode step costs no frame for it."""
        for side, owed in self._owed.items():
            if owed < WINDOW_BYTES // 4:
                continue
            self._outstanding[side] -= owed
            self._owed[side] = 0
            if side == "client":
                self.send(pb.PeerFrame(credit=pb.Credit(bytes=owed)))
            elif self._credit_upstream:
                self._credit_upstream(owed)

    def _link_fault(self, peer_id: str, reason: str) -> None:
        self.send(pb.PeerFrame(fault=pb.Fault(peer_id=peer_id, reason=reason, route_epoch=self.epoch)))
