"""Who sends too much, too slowly, or nothing at all: nobody else waits, and nothing of theirs stays."""

from __future__ import annotations

import asyncio

import grpc
from petal.protocol import petal_pb2 as pb
from petal.protocol.wire.limits import FRAME_BYTES, HEADER_BYTES, KEEPALIVE_S, SILENT_S

from tests.support.half_open import HALF_A_HELLO, PREFACE, SETTINGS, until_closed
from tests.support.wire import ANSWER_S, RawStream, Wire

from .tally import Tally

LATE_S = 5.0
# Of each kind at a time: both ends of a connection are files of this process.
AT_ONCE = 25
Code = grpc.StatusCode


async def oversized(tally: Tally, wire: Wire) -> None:
    """Frames and headers above the limits."""
    for size in (FRAME_BYTES + 1, 2 * FRAME_BYTES, 32 * FRAME_BYTES):
        session, _ = await wire.session()
        await _refused(tally, "oversized frame", session.step(1, prefill=True, embeddings=b"x" * size), session.call)
        wire.forget(session)
        link = wire.link()
        sending = link.send(activations=pb.Activations(hidden=b"x" * size))
        await _refused(tally, "oversized frame on a link", sending, link.call)
        wire.forget(link)
    for size in (HEADER_BYTES + 1, 4 * HEADER_BYTES):
        ping = wire.channel.unary_unary("/petal.v1.Directory/Ping")
        with tally.refuses("oversized header", grpc.aio.AioRpcError):
            await ping(b"", metadata=[("x", "y" * size)], timeout=ANSWER_S)


async def _refused(tally: Tally, attack: str, sending: object, call: grpc.aio.StreamStreamCall) -> None:
    with tally.refuses(attack, grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await sending  # type: ignore[misc]
        while await asyncio.wait_for(call.read(), ANSWER_S) is not grpc.aio.EOF:
            pass
    assert await call.code() in (Code.RESOURCE_EXHAUSTED, Code.INVALID_ARGUMENT), await call.details()


async def stalls(tally: Tally, wire: Wire) -> None:
    """Connections that stop half way, and streams that never say what they are for; takes as long as the limits."""
    half = [(b"", False, SILENT_S), (HALF_A_HELLO, False, SILENT_S), (PREFACE[:10], True, SILENT_S)]
    half += [(PREFACE + SETTINGS, True, KEEPALIVE_S)]
    await asyncio.gather(
        *(_half_open(tally, wire, *kind) for kind in half * min(tally.rounds, AT_ONCE)),
        *(_silent(tally, wire, begin()) for begin in [wire.stream, wire.link] * min(tally.rounds, AT_ONCE)),
    )


async def _half_open(tally: Tally, wire: Wire, said: bytes, tls: bool, limit: float) -> None:
    taken = await until_closed(wire.peer.address, said, tls, limit + LATE_S)
    tally.count("half-open connection", taken >= limit + LATE_S)


async def _silent(tally: Tally, wire: Wire, stream: RawStream) -> None:
    await stream.call.wait_for_connection()
    try:
        code = await asyncio.wait_for(stream.call.code(), SILENT_S + LATE_S)
    except asyncio.TimeoutError:
        code = Code.OK
    tally.count("silent stream", code is not Code.DEADLINE_EXCEEDED)
    stream.close()
    wire.forget(stream)
