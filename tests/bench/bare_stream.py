"""One-way time of bare gRPC between two processes: the floor of a hop.

The stream, the payload, TLS and uvloop are those of two peers; of their code there is nothing. So is the cadence: both
ends read as many bytes of weights as a third of the model has, on a thread beside the loop, the sender right before a
frame and the receiver right after it, and both rest while others would compute. A frame leaves when the sender's loop
has it, after that thread is through, and is there when the receiver's loop has it. Between ends that do nothing but
rest a frame takes about half to two thirds of that: their caches still hold the way. Peers' never do.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import numpy as np
import uvloop
from petal.protocol import petal_pb2 as pb
from petal.protocol.trust.identity import Identity
from petal.protocol.trust.trust import PublicTrust
from petal.protocol.wire.limits import SERVER_OPTIONS

METHOD = "/bare/Stream"
# A row of SmolLM2 in float32, and room for a header.
PAYLOAD = 576 * 4 + 64
# Float32 weights of ten blocks of it.
WEIGHTS = 10 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
PAUSE_S = 0.02
WARM_UP = 20


def compute(weights: np.ndarray) -> Awaitable[float]:
    """What evicts everything else from the caches, as a step's products do."""
    return asyncio.get_running_loop().run_in_executor(None, weights.sum)


async def receive(frames: int) -> None:
    """Print where to send and the certificate to expect; then milliseconds of each frame's way."""
    trust, done = PublicTrust(Identity.ephemeral()), asyncio.Event()
    weights, ways = np.ones(WEIGHTS, np.float32), list[float]()

    async def stream(requests: AsyncIterator[bytes], context: Any) -> None:
        async for frame in requests:
            ways.append((time.monotonic_ns() - int.from_bytes(frame[:8], "big")) / 1e6)
            await compute(weights)
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
    record, weights = pb.PeerRecord(certificates=[bytes.fromhex(certificate)]), np.ones(WEIGHTS, np.float32)
    async with PublicTrust().channel(record, address) as channel:
        call = channel.stream_stream(METHOD)()
        for _ in range(WARM_UP + frames):
            await asyncio.sleep(PAUSE_S)
            await compute(weights)
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
