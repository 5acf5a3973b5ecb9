"""What mutual TLS costs, and how soon a revocation is felt: `python -m tests.bench.security --json`.

Two peers of a private swarm and the same two over bare TCP take turns: a decode step, a step with a tree of K = 32, a
prompt of 448 tokens behind 64. A share is the median of what the two of a turn differ by, of the median step, compute
included. `revoke_s`: from `revoke` on the admin's machine until a running stream is cut, told by heartbeats alone.
`join_s`: from an invitation to a client that has its route.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import pytest
from petal.client.cli import demo
from petal.client.cli.demo import N_BLOCKS, ChildPeer, split
from petal.client.session.peer_error import PeerError
from petal.client.session.session import Session
from petal.client.swarm import AsyncSwarmModel
from petal.protocol.private.admin import AdminServer
from petal.protocol.private.authority import Authority
from petal.protocol.wire.sampling import SamplingParams
from petal.protocol.wire.tree import DraftTree

from tests.support.private_swarms import free_ports, home
from tests.support.trees import token_chain

from .plain_peer import PlainTrust
from .swarm import console, report, wait_ready

PEERS = 2
ROWS = 64
PROMPT = [(7 * i) % 4000 + 100 for i in range(512)]
TREE = token_chain([(11 * i) % 4000 + 100 for i in range(33)])
TLS, BARE = "mutual TLS", "bare TCP"
Times = dict[str, list[float]]
BARS = {"mtls_share_decode": 0.05, "mtls_share_tree": 0.05, "mtls_share_prefill": 0.10, "revoke_s": 60.0, "join_s": 5.0}


async def timed(work: Awaitable[object]) -> float:
    started = time.perf_counter()
    await work
    return time.perf_counter() - started


async def step(session: Session, tree: DraftTree) -> float:
    """Seconds of a step, after which the session is as before."""
    base = len(session.ids)
    seconds = await timed(session.step(tree))
    session.rewind(base)
    return seconds


async def prefill(session: Session) -> float:
    base = len(session.ids)
    seconds = await timed(session.prefill(PROMPT[: 512 - base]))
    session.rewind(base)
    return seconds


async def measure(contenders: dict[str, Session], count: int) -> dict[str, Times]:
    """Seconds. The contenders take turns at every step, and at going first: what else runs here hits them alike."""
    kinds: dict[str, tuple[int, Callable[[Session], Awaitable[float]]]] = {
        "decode": (count, lambda session: step(session, token_chain([300]))),
        "tree": (count // 2, lambda session: step(session, TREE)),
        "prefill": (count // 10, prefill),
    }
    found = {}
    for kind, (times, run) in kinds.items():
        taken: Times = {name: [] for name in contenders}
        for turn in range(times + 1):
            for name in sorted(contenders, reverse=turn % 2 == 0):
                taken[name].append(await run(contenders[name]))
        found[kind] = {name: values[1:] for name, values in taken.items()}
        console.print(f"[dim]{kind} measured[/dim]")
    return found


def share_of_tls(taken: Times) -> float:
    difference = median(tls - bare for tls, bare in zip(taken[TLS], taken[BARE], strict=True))
    return difference / median(taken[TLS])


@asynccontextmanager
async def children(folder: Path, *options: str) -> AsyncIterator[list[ChildPeer]]:
    """Peer processes."""
    started: list[ChildPeer] = []
    try:
        for blocks in split(N_BLOCKS, PEERS):
            initial = [started[0].address] if started and "--join" not in options else []
            started.append(ChildPeer.start(blocks, folder, initial, "--threads", "1", *options))
            await asyncio.to_thread(wait_ready, started[-1])
        yield started
    finally:
        for child in started:
            child.stop()
        for child in started:
            await asyncio.to_thread(child.wait, 10)


@asynccontextmanager
async def plain(folder: Path) -> AsyncIterator[AsyncSwarmModel]:
    """A client of peers over bare TCP."""
    program = folder / "plain-peer"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.bench.plain_peer "$@"\n')
    program.chmod(0o700)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "peer_program", lambda: str(program))
        async with children(folder) as peers:
            patch.setattr("petal.client.routing.connect.PublicTrust", PlainTrust)
            client = await AsyncSwarmModel.connect("demo", [peers[0].address], wait_s=20)
            yield client
            await client.close()


async def run(count: int) -> tuple[dict[str, Times], dict[str, float]]:
    """Times of steps, and seconds to join and to be cut."""
    with TemporaryDirectory(prefix="petal-bench-") as name:
        folder = Path(name)
        authority = Authority.init("bench", f"127.0.0.1:{free_ports()}", folder / "bench")
        admin = AdminServer(authority, "127.0.0.1")
        await admin.start()
        (folder / "plain").mkdir()
        token = authority.invite("peer", {}, PEERS, 3600)
        async with children(folder, "--join", token), plain(folder / "plain") as bare:
            invitation = authority.invite("client", {}, 1, 3600)
            with home(folder / "client"):
                started = time.perf_counter()
                client = await AsyncSwarmModel.connect("demo", join=invitation, wait_s=20)
            join_s = time.perf_counter() - started
            sessions = {TLS: await client.open_session(1024), BARE: await bare.open_session(1024)}
            for session in sessions.values():
                await session.prefill(PROMPT[:ROWS], SamplingParams())
            found = await measure(sessions, count)
            revoke_s = await cut(authority, client, sessions[TLS])
            for session in sessions.values():
                session.close()
            await client.close()
        await admin.stop()
    return found, {"revoke_s": revoke_s, "join_s": join_s}


async def cut(authority: Authority, client: AsyncSwarmModel, session: Session) -> float:
    """Seconds from a revocation to the end of a stream that is in use."""
    started = time.perf_counter()
    authority.revoke(client.trusted_ends.trust.name)  # type: ignore[attr-defined]
    while time.perf_counter() - started < 120:
        try:
            await session.step(token_chain([300]))
        except PeerError:
            break
        await asyncio.sleep(0.05)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--steps", type=int, default=120)
    options = parser.parse_args()
    found, seconds = asyncio.run(run(options.steps))
    figures = {f"mtls_share_{kind}": share_of_tls(taken) for kind, taken in found.items()} | seconds
    rows = [(kind, *(f"{median(taken[name]) * 1e3:.1f}" for name in (TLS, BARE))) for kind, taken in found.items()]
    report("Two peers, SmolLM2-135M as it is stored", rows, ("step", f"{TLS}, ms", f"{BARE}, ms"), figures)
    sys.exit(0 if all(figures[name] <= bar for name, bar in BARS.items()) else 1)


if __name__ == "__main__":
    main()
