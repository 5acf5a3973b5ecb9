"""A peer's side of one session: frames become steps, steps become answers; going back where the route changed.

Lives on the event loop and never blocks. Steps come in from the client (first and last stage) and from the peer before;
results go to the next peer, or to the client.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Protocol

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.wire.limits import PART_BYTES
from ..engine.engine import Engine
from ..engine.step import Step, StepOutput
from ..limits.answers import Owed
from ..limits.quotas import QuotaUsage
from ..limits.refused import Refused
from .compute import SessionCompute
from .flow_control import CreditWindow
from .next_hop import NextHop
from .outputs import Outputs, ToClient, ToNextHop
from .partial_steps import PartialSteps, client_step
from .replay import ReplayBudget
from .spec import SessionFailed, SessionSpec, invalid
from .state import SequenceState, StepRecord, not_between_steps
from .unread import Reader, Unread


class FrameWriter(Reader, Protocol):
    """Takes frames to the client; `put` returns the bytes that wait."""

    def put(self, frame: pb.PeerFrame) -> int: ...


class PeerSession:
    """One session on this peer. `failed` is set when the session must end."""

    def __init__(
        self,
        spec: SessionSpec,
        usage: QuotaUsage,
        engine: Engine,
        budget: ReplayBudget,
        epoch: int,
        writer: FrameWriter,
        owes: Callable[[PeerSession], None],
    ) -> None:
        """`writer` takes frames to the client; `owes` is called where answers of this session need much room."""
        self.spec = spec
        self.usage = usage
        # The engine's name for it: a session that is opened anew shares nothing with the one before.
        self.key = secrets.token_bytes(16)
        self.link_token = secrets.token_bytes(16)
        self.epoch = epoch
        self.failed: asyncio.Future[SessionFailed] = asyncio.get_running_loop().create_future()
        self.next_hop = NextHop(self._link_fault)
        self.state = SequenceState(spec)
        self.send = writer.put
        self._unread = Unread(spec, (writer, self.next_hop), lambda: owes(self))
        self._credit_upstream: Callable[[int], None] | None = None
        self._compute = SessionCompute(engine, self.key, self.fail)
        self._outputs: Outputs = ToClient(writer.put) if spec.is_last else ToNextHop(spec, self.next_hop, budget)
        self._partial = PartialSteps(spec)
        self._from_client, self._from_link = CreditWindow(), CreditWindow()

    @property
    def idle_s(self) -> float:
        """Seconds since anything happened."""
        return self._compute.idle_s

    @property
    def owed(self) -> Owed:
        """Answers that are in the making or unread."""
        return self._unread.owed

    # Frames from the client and from the peer before.

    def on_step(self, message: pb.Step, size: int) -> None:
        """A step on the client's own stream. Raises SessionFailed."""
        arrived_ns, spec = time.monotonic_ns(), self.spec
        if not (spec.is_first or spec.is_last):
            raise invalid("steps go to the first and the last stage; this peer is neither")
        self._compute.last_used = arrived_ns / 1e9
        self._from_client.take(size)
        if not self._current(message.route_epoch):
            return
        step = client_step(message, spec)
        step.received_ns = arrived_ns
        if step.header.replay:
            if not spec.is_first:
                raise invalid("a client replays to the first stage only")
            self._replay(step)
            return
        self._partial.add_client(step, self.state.step)
        self._run_whole(step.header.step)

    def on_activations(self, message: pb.Activations, size: int) -> None:
        """Part of a step on the link from the peer before. Raises SessionFailed."""
        arrived_ns = time.monotonic_ns()
        if self.spec.is_first:
            raise invalid("the first stage takes no activations")
        self._compute.last_used = arrived_ns / 1e9
        self._from_link.take(size)
        if not self._current(message.route_epoch):
            return
        if self.spec.is_last and not message.replay and message.step <= self.state.step:
            return  # a repeat, which the client's word drives here
        step = self._partial.add_link(message, self.state.step)
        if step is None:
            return
        step.received_ns = arrived_ns
        if step.header.replay:
            self._replay(step)
        else:
            self._run_whole(step.header.step)

    def on_route(self, epoch: int) -> None:
        """The client changed its route: frames of older epochs are dropped from now on."""
        if epoch < self.epoch:
            raise invalid(f"route epoch {epoch} is older than {self.epoch}; epochs only rise")
        if epoch > self.epoch:
            self._partial.forget_link()
        self.epoch = epoch

    def on_resume(self, message: pb.Resume) -> None:
        """Go back to where the client stands; `Resumed` tells it once the compute thread has. Raises SessionFailed."""
        self.on_route(message.route_epoch)
        self.state.check_resume(message)
        self._compute.last_used = time.monotonic()
        self._partial.forget()
        self.next_hop.restart(iter(()))
        self.link_token = secrets.token_bytes(16)
        kept = 0 if message.replayed else message.length
        self._compute.resume(kept, tuple(message.commit), lambda: self._resumed(message))

    def on_uplink(self, credit: Callable[[int], None]) -> None:
        """The peer before has linked up; `credit` gives it bytes back."""
        self._credit_upstream = credit
        self._from_link.restart()

    def start_behind(self, message: pb.Resume) -> None:
        """Take another peer's place: its rows come as a replay. Raises SessionFailed."""
        self.state.check_room(message.length)
        self._outputs.expect_replay(message.replay)
        self.state.resume(message.step, message.length, missing=message.length)

    def adopt(self, parent: PeerSession) -> None:
        """Start as a fork of a session of the same client. Raises SessionFailed."""
        if parent._compute.resuming:
            raise not_between_steps()
        self.state.adopt(parent.state)
        self._outputs.adopt(parent._outputs)

    def close(self) -> None:
        self._compute.close()
        self.next_hop.restart(iter(()))
        self._outputs.close()
        self.state.newest = None

    def fail(self, failure: SessionFailed) -> None:
        if not self.failed.done():
            self.failed.set_result(failure)

    # A whole step.

    def _current(self, epoch: int) -> bool:
        if epoch > self.epoch:
            raise invalid(f"route epoch {epoch} was not announced; this session is at {self.epoch}")
        if epoch == self.epoch and self._compute.resuming:
            raise invalid("steps wait for the resumed frame")
        return epoch == self.epoch

    def _run_whole(self, number: int) -> None:
        """Run the step if every part of it is here; a repeat gets its answer again. Raises SessionFailed."""
        step = self._partial.take(number, self.state.step)
        if step is None:
            return
        if record := self.state.accept(step):
            try:
                if self.usage.is_limited:
                    self.usage.spend(step.header.rows)
            except Refused as error:
                raise SessionFailed(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None
            if step.header.want_logits or step.header.want_hidden:
                self._unread.promise(record)
            if not self.failed.done():
                self._compute.run(step, lambda output: self._finished(record, step, output))
        elif self.state.newest:
            self._check_unread(self._outputs.answer(self.state.newest, self.epoch))

    def _replay(self, step: Step) -> None:
        """Compute rows that another peer had computed before. Raises SessionFailed."""
        self.state.replay(step.header)
        self._compute.run(step, lambda output: self._replayed(step, output))

    # Results.

    def _finished(self, record: StepRecord, step: Step, output: StepOutput) -> None:
        hops = [*step.hops, step.hop(self.spec.peer_id)] if step.header.trace else step.hops
        record.finished = True
        self._check_unread(self._outputs.finished(record, output, hops, self.epoch))
        self._return_credit()

    def _replayed(self, step: Step, output: StepOutput) -> None:
        self._outputs.replayed(step.header, output, self.epoch)
        self._return_credit()

    def _check_unread(self, queued: int) -> None:
        if queued > PART_BYTES and (failure := self._unread.too_much(queued)):
            self.fail(failure)

    def _resumed(self, message: pb.Resume) -> None:
        self._unread.forget_promises()
        self.state.resume(message.step, message.length, missing=message.length if message.replayed else 0)
        lost = self._outputs.resume(message, self.epoch)
        resumed = pb.Resumed(route_epoch=message.route_epoch, link_token=self.link_token, log_lost=lost)
        self.send(pb.PeerFrame(resumed=resumed))

    def _return_credit(self) -> None:
        if owed := self._from_client.give_back():
            self.send(pb.PeerFrame(credit=pb.Credit(bytes=owed)))
        if self._credit_upstream and (owed := self._from_link.give_back()):
            self._credit_upstream(owed)

    def _link_fault(self, peer_id: str, reason: str) -> None:
        self.send(pb.PeerFrame(fault=pb.Fault(peer_id=peer_id, reason=reason, route_epoch=self.epoch)))
