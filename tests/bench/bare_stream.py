"""One-way time of bare gRPC between two processes: the floor of a hop.

The stream, the payload, TLS and uvloop are those of two peers; there is nothing else. As between peers, a frame comes
when nothing else is under way.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import uvloop
from petal.protocol import petal_pb2 as pb
from petal.protocol.trust.identity import Identity
from petal.protocol.trust.trust import PublicTrust
from petal.protocol.wire.limits import SERVER_OPTIONS

METHOD = "/bare/Stream"
# A row of SmolLM2 in float32, and room for a header.
PAYLOAD = 576 * 4 + 64
PAUSE_S = 0.01
WARM_UP = 20


async def receive(frames: int) -> None:
    """Print where to send and the certificate to expect; then milliseconds of each frame's way."""
    trust, done = PublicTrust(Identity.ephemeral()), asyncio.Event()

    async def stream(requests: AsyncIterator[bytes], context: Any) -> None:
        ways = [(time.monotonic_ns() - int.from_bytes(frame[:8], "big")) / 1e6 async for frame in requests]
        print(*ways[-frames:], flush=True)
        done.set()

    handler = grpc.method_handlers_generic_handler("bare", {"Stream": grpc.stream_stream_rpc_method_handler(stream)})
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_secure_port("127.0.0.1:0", trust.server_credentials())
    await server.start()
    print(f"127.0.0.1:{port}", trust.certificates[0].hex(), flush=True)
    await done.wait()
    await server.stop(0.1)


async def send(frames: int, address: str, certificate: str) -> None:
    record = pb.PeerRecord(certificates=[bytes.fromhex(certificate)])
    async with PublicTrust().channel(record, address) as channel:
        call = channel.stream_stream(METHOD)()
        for _ in range(WARM_UP + frames):
            await asyncio.sleep(PAUSE_S)
            await call.write(time.monotonic_ns().to_bytes(8, "big") + bytes(PAYLOAD))
        await call.done_writing()
        await call.read()


def one_way_ms(frames: int) -> list[float]:
    """Milliseconds of each of `frames` frames between two processes of their own."""
    command = [sys.executable, "-m", "tests.bench.bare_stream"]
    receiver = subprocess.Popen([*command, "receive", str(frames)], stdout=subprocess.PIPE, text=True)
    assert receiver.stdout
    where = receiver.stdout.readline().split()
    subprocess.run([*command, "send", str(frames), *where], check=True)
    said, _ = receiver.communicate(timeout=30)
    return [float(way) for way in said.split()]


if __name__ == "__main__":
    role, count, *rest = sys.argv[1:]
    uvloop.run({"receive": receive, "send": send}[role](int(count), *rest))
