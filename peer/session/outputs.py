"""Where the outputs of a session go, and in what frames.

To the next peer and into the replay log, or from the last stage to the client.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.wire.limits import PART_BYTES
from ...protocol.wire.step import StepHeader, put_header
from ..engine.step import StepOutput
from .next_hop import NextHop
from .replay import ReplayBudget, ReplayLog
from .spec import SessionFailed, SessionSpec
from .state import StepRecord

# Frames of an answer that is kept for a repeat: what a decode step brings, whole logits hardly.
MOST_KEPT = 4


class Outputs(ABC):
    """What both kinds do."""

    @abstractmethod
    def finished(self, record: StepRecord, output: StepOutput, hops: Iterable[pb.Hop], epoch: int) -> int:
        """Answer a step, and put down with what; returns the bytes that wait to be read."""

    @abstractmethod
    def answer(self, record: StepRecord, epoch: int) -> int:
        """Send a step's answer, again where it was sent before; returns the bytes that wait to be read."""

    def replayed(self, header: StepHeader, output: StepOutput, epoch: int) -> None:  # noqa: B027 (the client has it)
        """Rows that another peer had computed before."""

    def expect_replay(self, passed_on: bool) -> None:  # noqa: B027
        """Rows will come as a replay, and are `passed_on` to a next peer that lacks them."""

    def resume(self, message: pb.Resume, epoch: int) -> bool:
        """Go back to where the client stands; whether outputs that it asks for are lost."""
        return False

    def adopt(self, parent: Outputs) -> None:  # noqa: B027
        """Start as a fork."""

    def close(self) -> None:  # noqa: B027
        """Forget everything."""


class ToClient(Outputs):
    """Those of the last stage. The client alone gets them, so nothing is kept but the newest answer, if it is small."""

    def __init__(self, send: Callable[[pb.PeerFrame], int]) -> None:
        self._send = send

    def finished(self, record: StepRecord, output: StepOutput, hops: Iterable[pb.Hop], epoch: int) -> int:
        record.answer = result_frames(record.header, output, hops)
        queued = self.answer(record, epoch)
        if len(record.answer) > MOST_KEPT:
            record.answer = ()
        return queued

    def answer(self, record: StepRecord, epoch: int) -> int:
        if record.finished and not record.answer:
            raise SessionFailed(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"the answer to step {record.header.step} is not kept; go back before that step by a resume frame",
            )
        return max((self._send(frame) for frame in record.answer if isinstance(frame, pb.PeerFrame)), default=0)


class ToNextHop(Outputs):
    """Those of any other stage; a log keeps them for a peer that takes the next one's place."""

    def __init__(self, spec: SessionSpec, next_hop: NextHop, budget: ReplayBudget) -> None:
        self._row_bytes = spec.row_bytes
        self._next_hop = next_hop
        self._log = ReplayLog(spec.row_bytes, budget)
        self._passes_replay_on = False

    def finished(self, record: StepRecord, output: StepOutput, hops: Iterable[pb.Hop], epoch: int) -> int:
        header = record.header
        record.answer = link_frames(header, output.hidden, hops)
        queued = self.answer(record, epoch)
        # Only now, on the time of the next peer.
        self._log.apply(header.commit, header.rewind)
        (self._log.append if header.prefill else self._log.hold)(output.hidden)
        return queued

    def answer(self, record: StepRecord, epoch: int) -> int:
        queued = 0
        for frame in record.answer:
            assert isinstance(frame, pb.LinkFrame)
            frame.activations.route_epoch = epoch
            queued = self._next_hop.send(frame)
        return queued

    def replayed(self, header: StepHeader, output: StepOutput, epoch: int) -> None:
        self._log.append(output.hidden)
        if self._passes_replay_on:
            for frame in self._replay(header.step, epoch, header.base, [output.hidden], header.extent):
                self._next_hop.send(frame)

    def expect_replay(self, passed_on: bool) -> None:
        self._passes_replay_on = passed_on

    def resume(self, message: pb.Resume, epoch: int) -> bool:
        log = self._log
        self._passes_replay_on = message.replay and message.replayed
        if message.replayed:
            log.restart()
        else:
            log.resume(message.length, message.commit)
            if message.replay and not log.lost:
                self._next_hop.restart(self._replay(message.step, epoch, 0, log.chunks, message.extent))
        return message.replay and log.lost

    def adopt(self, parent: Outputs) -> None:
        assert isinstance(parent, ToNextHop)
        self._log = parent._log.fork()

    def close(self) -> None:
        self._log.lose()

    def _replay(self, step: int, epoch: int, base: int, chunks: Sequence[bytes], extent: int) -> Iterator[pb.LinkFrame]:
        return replay_frames(step, epoch, base, chunks, self._row_bytes, extent)


def link_frames(header: StepHeader, hidden: bytes, hops: Iterable[pb.Hop]) -> list[pb.LinkFrame]:
    """Frames of at most PART_BYTES of activations for the next peer."""
    frames = []
    for start in range(0, len(hidden), PART_BYTES):
        frame = pb.LinkFrame()
        message = frame.activations
        put_header(header, message)
        message.hidden = hidden[start : start + PART_BYTES]
        message.total_bytes = len(hidden)
        frames.append(frame)
    frames[0].activations.hops.extend(hops)
    return frames


def replay_frames(
    step: int, epoch: int, base: int, chunks: Iterable[bytes], row_bytes: int, extent: int = 0
) -> Iterator[pb.LinkFrame]:
    """The chunks' rows from `base` on, behind `step`, for a peer that lacks them: whole rows in every frame."""
    for part in whole_rows(chunks, row_bytes, PART_BYTES):
        rows = len(part) // row_bytes
        message = pb.Activations(step=step, route_epoch=epoch, base=base, rows=rows, prefill=True, replay=True)
        message.hidden, message.total_bytes, message.extent = part, len(part), extent
        yield pb.LinkFrame(activations=message)
        base += rows


def result_frames(header: StepHeader, result: StepOutput, hops: Iterable[pb.Hop]) -> list[pb.PeerFrame]:
    """Frames for the client: what was accepted in the first, large payloads in parts."""
    frames = [pb.PeerFrame(result=pb.Result(step=header.step, hops=hops))]
    first = frames[0].result
    if result.verification:
        first.sampled = True
        first.accepted.extend(result.verification.accepted)
        first.next_token = result.verification.next_token
        first.logprobs.extend(row.message() for row in result.verification.logprobs)
    for name, payload in (("logits", result.logits), ("hidden", result.hidden)):
        for part in _parts(payload):
            frame = pb.PeerFrame()
            frame.result.step = header.step
            setattr(frame.result, name, part)
            frames.append(frame)
    frames[-1].result.last_part = True
    return frames


def whole_rows(chunks: Iterable[bytes], row_bytes: int, most: int) -> Iterator[bytes]:
    """The chunks' rows, in order, in parts of at most `most` bytes, but of one row at least."""
    size = max(1, most // row_bytes) * row_bytes
    waiting = bytearray()
    for chunk in chunks:
        for start in range(0, len(chunk), size):
            waiting += chunk[start : start + size]
            if len(waiting) >= size:
                yield bytes(waiting[:size])
                del waiting[:size]
    if waiting:
        yield bytes(waiting)


def _parts(payload: bytes) -> Iterator[bytes]:
    return (payload[start : start + PART_BYTES] for start in range(0, len(payload), PART_BYTES))
