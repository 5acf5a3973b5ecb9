"""Between the engine's values and frames on the wire."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ...protocol import petal_pb2 as pb
from ...protocol.wire.limits import PART_BYTES
from ...protocol.wire.sampling import SamplingError, SamplingParams
from ...protocol.wire.step import StepHeader, activations_of
from ..engine.step import Step, StepOutput


def hop_of(step: Step, peer_id: str) -> pb.Hop:
    """When a step was where on this peer."""
    return pb.Hop(
        peer_id=peer_id,
        received_ns=step.received_ns,
        start_ns=step.started_ns,
        end_ns=step.ended_ns,
        queue_ns=step.queued_ns,
    )


def link_frames(header: StepHeader, hidden: bytes, hops: Iterable[pb.Hop]) -> list[pb.LinkFrame]:
    """Frames of at most PART_BYTES of activations for the next peer."""
    frames = []
    for part in _parts(hidden):
        message = activations_of(header)
        message.hidden = part
        message.total_bytes = len(hidden)
        frames.append(pb.LinkFrame(activations=message))
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
    first = pb.Result(step=header.step, hops=hops)
    if result.verification:
        first.sampled = True
        first.accepted.extend(result.verification.accepted)
        first.next_token = result.verification.next_token
        first.logprobs.extend(row.message() for row in result.verification.logprobs)
    results = [first]
    results += [pb.Result(step=header.step, logits=part) for part in _parts(result.logits)]
    results += [pb.Result(step=header.step, hidden=part) for part in _parts(result.hidden)]
    results[-1].last_part = True
    return [pb.PeerFrame(result=part) for part in results]


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


def _parts(payload: bytes) -> list[bytes]:
    return [payload[start : start + PART_BYTES] for start in range(0, len(payload), PART_BYTES)]


def sampling_of(message: pb.Sampling) -> SamplingParams:
    """Raises SamplingError for a value out of range, and by name for a field that this version does not serve."""
    if message.logit_bias or message.grammar_mask:
        name = "logit_bias" if message.logit_bias else "grammar_mask"
        raise SamplingError(f"this peer does not serve {name} yet")
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        seed=message.seed,
        sequence=message.sequence,
    )
