"""The way into a swarm whose peers may all have started again at once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Collection, Sequence

import grpc

from ..protocol import petal_pb2 as pb
from ..protocol.directory.directory import DirectoryError
from ..protocol.petal_pb2_grpc import DirectoryStub
from ..protocol.trust.trust import Trust
from ..protocol.wire.limits import DIRECTORY_OPTIONS

# For so long a peer waits for those that it knows, before it goes on without them; they find each other later.
JOIN_S = 10.0
ASK_S = 10.0


async def ways_into_dht(
    initial_peers: Sequence[str], met: Collection[str], trust: Trust, note: Callable[[str], None]
) -> list[str]:
    """Multiaddrs to join the DHT through: as given, or asked of peers at gRPC host:ports, the `met` ones included.

    One that answers is enough. Where none does, the addresses are wrong, unless this peer has met somebody there: then
    the list is empty. Raises DirectoryError.
    """
    given = [peer for peer in initial_peers if peer.startswith("/")]
    asked = [peer for peer in dict.fromkeys([*initial_peers, *met]) if not peer.startswith("/")]
    if not initial_peers:
        return []
    strange = set(initial_peers).isdisjoint(met)
    deadline, pause_s = time.monotonic() + JOIN_S, 0.5
    while True:
        found = [
            address for answer in await asyncio.gather(*(_ask(peer, trust) for peer in asked)) for address in answer
        ]
        if found or given:
            return [*given, *dict.fromkeys(found)]
        if strange:
            raise DirectoryError(
                f"No peer answers at {' or '.join(asked)}: check the address, or name another with --initial-peers."
            )
        if time.monotonic() > deadline:
            note(f"nobody answers at {' or '.join(initial_peers)} yet: serving alone, and trying on")
            return []
        await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
        pause_s *= 2


async def _ask(peer: str, trust: Trust) -> Sequence[str]:
    try:
        async with trust.dial(peer, DIRECTORY_OPTIONS) as channel:
            reply = await DirectoryStub(channel).List(pb.ListRequest(model="-"), timeout=ASK_S)
    except (grpc.aio.AioRpcError, OSError):
        return ()
    return reply.bootstrap
