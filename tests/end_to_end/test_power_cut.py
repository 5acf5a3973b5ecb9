"""Everybody starts again at once: nobody is there yet whom the others list, and they find each other all the same."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from petal.client.swarm import AsyncSwarmModel
from petal.peer import bootstrap
from petal.peer.options import ServeOptions
from petal.peer.server import PeerServer
from petal.protocol.directory.directory import DirectoryError

from ..support.tiny import tiny_llama

SPANS = [range(0, 2), range(2, 4)]
SOON_S = 30.0


pytestmark = pytest.mark.waits


def peer(folder: Path, place: int, *initial: str) -> PeerServer:
    identity = folder / f"identity-{place}"
    return PeerServer(
        ServeOptions(
            str(tiny_llama()), SPANS[place], host="127.0.0.1", identity=identity, initial_peers=initial, publish_s=0.5
        )
    )


async def know_each_other(peers: list[PeerServer], since: float) -> None:
    deadline = time.monotonic() + SOON_S
    while any(sum(r.version > since * 1000 for r in each.directory.book.list()) < len(peers) for each in peers):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["first first", "first last"])
async def test_peers_that_list_each_other_all_start_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[int]
) -> None:
    monkeypatch.setattr(bootstrap, "JOIN_S", 0.3)
    first = peer(tmp_path, 0)
    await first.start()
    second = peer(tmp_path, 1, first.address)
    await second.start()
    await know_each_other([first, second], 0)
    addresses = [first.address, second.address]
    await asyncio.gather(first.stop(), second.stop())
    since = time.time()
    again = [peer(tmp_path, 0, addresses[1]), peer(tmp_path, 1, addresses[0])]
    for place in order:
        # One is up before the other begins: it can wait for nobody.
        await again[place].start()
    assert [each.address for each in again] == addresses
    await know_each_other(again, since)
    client = await AsyncSwarmModel.connect(str(tiny_llama()), addresses[:1], wait_s=20)
    assert [piece async for piece in client.stream([1, 5, 9], max_new_tokens=2, drafter="none")]
    await client.close()
    await asyncio.gather(*(each.stop() for each in again))


async def test_one_of_several_listed_peers_is_enough(tmp_path: Path) -> None:
    first = peer(tmp_path, 0)
    await first.start()
    second = peer(tmp_path, 1, "127.0.0.1:1", first.address)
    await second.start()
    await know_each_other([first, second], 0)
    await second.stop()
    await first.stop()


async def test_an_address_where_nobody_ever_was_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DirectoryError, match=r"No peer answers at 127\.0\.0\.1:1: check the address"):
        await peer(tmp_path, 0, "127.0.0.1:1").start()
