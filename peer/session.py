"""A peer's side of one session: counters, commits and repeats, checked before anything reaches the engine.

Lives on the event loop and never blocks. Steps come in from the client (head and tail) and from the peer before;
results go to the next peer, or to the client.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import grpc

from ..protocol import petal_pb2 as pb
from ..protocol.limits import ANSWER_BYTES, UNREAD_BYTES, WINDOW_BYTES
from ..protocol.sampling import SamplingError, SamplingParams
from ..protocol.step import StepError, StepHeader, header_of
from ..protocol.tree import TreeError, check_path, depths
from .engine import Engine
from .frames import link_frames, result_frames, sampling_of
from .job import BadStep, DeadlinePassed, StepFailed, StepInput, StepOutput
from .link import Downlink
from .session_spec import SessionFailed, SessionSpec, invalid
from .tail import TokenHistory

_STATUS = {
    BadStep: grpc.StatusCode.INVALID_ARGUMENT,
    DeadlinePassed: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass
class _ClientPart:
    """What the client sends of a step: ids for head and tail, sampling for the tail."""

    header: StepHeader
    ids: tuple[int, ...]
    sampling: SamplingParams | None
    history: TokenHistory | None


@dataclass
class _LinkPart:
    """What the peer before sends of a step, in parts until it is whole."""

    header: StepHeader
    hidden: bytearray
    total: int
    hops: list[pb.Hop]
    ids: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        return len(self.hidden) == self.total


@dataclass
class _Accepted:
    """The newest accepted step: what the next one is checked against, and its answer once there is one."""

    header: StepHeader
    ids: tuple[int, ...]
    finished: bool = False
    answer: list[pb.PeerFrame] | list[pb.LinkFrame] | None = None


class PeerSession:
    """One session on this peer. `send` hands frames to the client; `failed` is set when the session must end."""

    def __init__(self, spec: SessionSpec, engine: Engine, epoch: int, send: Callable[[pb.PeerFrame], int]) -> None:
        self.spec = spec
        self.link_token = secrets.token_bytes(16)
        self.epoch = epoch
        self.failed: asyncio.Future[SessionFailed] = asyncio.get_running_loop().create_future()
        self.downlink = Downlink(self._link_fault)
        self.credit_upstream: Callable[[int], None] | None = None
        self.last_used = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._engine = engine
        self._send = send
        self._length = 0
        self._newest: _Accepted | None = None
        self._client_part: dict[int, _ClientPart] = {}
        self._link_part: dict[int, _LinkPart] = {}
        self._outstanding = {"client": 0, "link": 0}
        self._owed = {"client": 0, "link": 0}

    # Frames from the client and from the peer before.

    def on_step(self, message: pb.Step, size: int) -> None:
        """A step on the client's own stream. Raises SessionFailed."""
        if not (self.spec.is_head or self.spec.is_tail):
            raise invalid("steps go to the head and the tail peer; this peer is neither")
        self._take_credit("client", size)
        if not self._current(message.route_epoch):
            return
        part = self._check_client_part(message)
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
        if self.spec.is_tail and self._newest and message.step <= self._newest.header.step:
            return  # a repeat, which the client's word drives here
        part = self._link_part.get(message.step) or self._new_link_part(message)
        part.hidden += message.hidden
        if len(part.hidden) > part.total:
            raise invalid(f"step {message.step} brings {len(part.hidden)} bytes, {part.total} were announced")
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

    def close(self) -> None:
        self._engine.close(self.spec.session_id)
        self.downlink.close()

    def fail(self, failure: SessionFailed) -> None:
        if not self.failed.done():
            self.failed.set_result(failure)

    def state_of_fork(self) -> tuple[int, _Accepted | None]:
        return self._length, self._newest

    def adopt(self, parent: PeerSession) -> None:
        """Start as a fork of a session of the same client, whose newest step must have finished."""
        length, newest = parent.state_of_fork()
        if newest is not None and not newest.finished:
            raise SessionFailed(grpc.StatusCode.FAILED_PRECONDITION, "a session forks only between two steps")
        self._length = length
        self._newest = newest and _Accepted(newest.header, newest.ids, finished=True)

    # Checks.

    def _current(self, epoch: int) -> bool:
        if epoch > self.epoch:
            raise invalid(f"route epoch {epoch} was not announced; this session is at {self.epoch}")
        return epoch == self.epoch

    def _check_client_part(self, message: pb.Step) -> _ClientPart:
        try:
            if message.op != pb.FORWARD:
                raise StepError("this peer runs forward steps only")
            if message.embeddings:
                raise StepError("this peer does not take embeddings yet; send token ids")
            header = header_of(message, len(message.ids))
            worst = max(message.ids)
            if worst >= self.spec.vocab_size:
                raise StepError(f"token id {worst} is past the vocabulary of {self.spec.vocab_size}")
            sampling = sampling_of(message.sampling) if message.HasField("sampling") else None
            history = self._history(message) if message.HasField("history") else None
        except (StepError, SamplingError) as error:
            raise invalid(str(error)) from error
        return _ClientPart(header, tuple(message.ids), sampling, history)

    def _history(self, message: pb.Step) -> TokenHistory:
        history = message.history
        if len(history.ids) != message.base or history.prompt_length > len(history.ids):
            raise StepError(f"a history of {len(history.ids)} ids does not fit {message.base} cached rows")
        if history.ids and max(history.ids) >= self.spec.vocab_size:
            raise StepError(f"the history holds an id past the vocabulary of {self.spec.vocab_size}")
        return TokenHistory(list(history.ids), history.prompt_length)

    def _new_link_part(self, message: pb.Activations) -> _LinkPart:
        try:
            header = header_of(message, message.rows)
        except StepError as error:
            raise invalid(str(error)) from error
        expected = header.rows * self.spec.row_bytes
        if message.total_bytes != expected:
            raise invalid(
                f"{header.rows} rows are {expected} bytes in this session's codec, {message.total_bytes} were announced"
            )
        self._check_order(header.step, self._link_part)
        part = _LinkPart(header, bytearray(), expected, list(message.hops))
        self._link_part[header.step] = part
        return part

    def _check_order(self, step: int, waiting: Iterable[int]) -> None:
        """On one stream no step is left out, else what never becomes whole would pile up."""
        newest = self._newest.header.step if self._newest else 0
        expected = max(newest, *waiting, 0) + 1
        if step > expected:
            raise invalid(f"step {step} is ahead; step {expected} comes next")

    def _take_credit(self, side: str, size: int) -> None:
        self.last_used = time.monotonic()
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
        if self._newest and step <= self._newest.header.step:
            # A repeat: the client's word drives it at head and tail, the link's elsewhere.
            self._forget(step)
            if driver := from_client if needs_client else from_link:
                self._accept(driver.header, driver.ids)
            return
        if (needs_client and not from_client) or (not self.spec.is_head and not (from_link and from_link.whole)):
            return
        self._forget(step)
        if from_client and from_link and from_client.header.content != from_link.header.content:
            raise invalid(f"step {step} differs between the client's stream and the link")
        part = from_client or from_link
        assert part is not None
        if self._accept(part.header, part.ids):
            self._submit(part.header, from_client, from_link, time.monotonic_ns())

    def _forget(self, step: int) -> None:
        self._client_part.pop(step, None)
        self._link_part.pop(step, None)

    def _accept(self, header: StepHeader, ids: tuple[int, ...]) -> bool:
        """Advance the counters for a new step; re-send the answer of a repeated one. Raises SessionFailed."""
        newest = self._newest
        expected = newest.header.step + 1 if newest else 1
        if newest and header.step == newest.header.step:
            if (header.content, ids) != (newest.header.content, newest.ids):
                raise invalid(f"step {header.step} was repeated with other content; a repeat must be the same")
            self._answer(newest)
            return False
        if header.step != expected:
            word = "stale" if header.step < expected else "ahead"
            raise invalid(f"step {header.step} is {word}; step {expected} comes next")
        self._length = self._check_base(header, newest)
        if header.prefill:
            self._length += header.rows
        self._newest = _Accepted(header, ids)
        return True

    def _check_base(self, header: StepHeader, newest: _Accepted | None) -> int:
        """Committed rows before this step, after its commit and rewind."""
        length = self._length
        if newest and not newest.header.prefill:
            if not newest.finished:
                raise invalid("one tree is in flight a session; wait for its result")
            try:
                check_path(newest.header.parents, header.commit)
            except TreeError as error:
                raise invalid(f"bad commit: {error}") from error
            length += len(header.commit)
        elif header.commit:
            raise invalid("the step before left nothing to commit")
        if header.rewind is not None:
            if header.rewind > length:
                raise invalid(f"cannot rewind to {header.rewind}: only {length} rows are cached")
            length = header.rewind
        if header.base != length:
            raise invalid(f"base is {header.base}, but {length} rows are cached")
        if length + header.rows > self.spec.reserve_tokens:
            raise SessionFailed(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{length + header.rows} rows exceed the {self.spec.reserve_tokens} that this session reserved",
            )
        if length + max(depths(header.parents)) >= self.spec.context_length:
            raise invalid(f"the model's context ends at position {self.spec.context_length - 1}")
        if header.want_logits and header.rows * self.spec.vocab_size * 4 > ANSWER_BYTES:
            raise invalid(f"logits of {header.rows} rows exceed an answer of {ANSWER_BYTES} bytes; ask for fewer rows")
        if header.rows > self.spec.max_rows:
            raise invalid(f"a step of {header.rows} rows; this peer takes up to {self.spec.max_rows}")
        return length

    def _submit(
        self, header: StepHeader, from_client: _ClientPart | None, from_link: _LinkPart | None, received_ns: int
    ) -> None:
        accepted = self._newest
        assert accepted is not None
        step = StepInput(
            ids=from_client.ids if from_client else (),
            hidden=from_link.hidden if from_link else bytearray(),
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

        def done(result: StepOutput | StepFailed) -> None:
            self._loop.call_soon_threadsafe(self._finished, accepted, result, hops, received_ns)

        self._engine.submit(self.spec.session_id, step, done)

    # Results.

    def _finished(
        self, accepted: _Accepted, result: StepOutput | StepFailed, hops: list[pb.Hop], received_ns: int
    ) -> None:
        if isinstance(result, StepFailed):
            self.fail(SessionFailed(_STATUS.get(type(result), grpc.StatusCode.INTERNAL), str(result)))
            return
        if accepted.header.trace:
            hop = pb.Hop(
                peer_id=self.spec.peer_id,
                received_ns=received_ns,
                start_ns=result.started_ns,
                end_ns=result.ended_ns,
                queue_ns=result.queued_ns,
            )
            hops = [*hops, hop]
        accepted.finished = True
        accepted.answer = (
            result_frames(accepted.header, result, hops)
            if self.spec.is_tail
            else link_frames(accepted.header, result.hidden, hops)
        )
        self._answer(accepted)
        self._return_credit()

    def _answer(self, accepted: _Accepted) -> None:
        """Send the step's answer, again where it is a repeat. What nobody takes must not pile up."""
        queued = 0
        for frame in accepted.answer or ():
            if isinstance(frame, pb.PeerFrame):
                queued = self._send(frame)
            else:
                frame.activations.route_epoch = self.epoch
                queued = self.downlink.send(frame)
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
                self._send(pb.PeerFrame(credit=pb.Credit(bytes=owed)))
            elif self.credit_upstream:
                self.credit_upstream(owed)

    def _link_fault(self, peer_id: str, reason: str) -> None:
        self._send(pb.PeerFrame(fault=pb.Fault(peer_id=peer_id, reason=reason, route_epoch=self.epoch)))
