"""A real swarm whose weights change under the same name, config and tensor names: only their bytes tell."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from petal.client.cli.status import swarm_status
from petal.client.routing.peers import ConnectError
from petal.client.swarm import AsyncSwarmModel
from petal.peer import fellows
from petal.peer.options import ServeOptions
from petal.peer.progress import StartProgress
from petal.peer.server import PeerServer

from ..support.commands import petal
from ..support.swarms import LocalSwarm, local_swarm
from ..support.tiny import tiny_llama

PROMPT = [1, 5, 9, 4, 77]


def altered(model: Path, folder: Path) -> Path:
    """The same model but for its last stored byte."""
    copy = shutil.copytree(model, folder / model.name)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    return copy


async def test_other_bytes_are_refused_until_they_are_accepted(tmp_path: Path) -> None:
    model = tiny_llama()
    async with local_swarm(model, [range(0, 4)]) as swarm, swarm.connect() as client:
        await client.generate(PROMPT, max_new_tokens=2)
    async with local_swarm(altered(model, tmp_path), [range(0, 4)]) as swarm:
        with pytest.raises(ConnectError, match=f"known weights of {model.name}; 1 of its peers .* `petal forget"):
            await swarm.connect(wait_s=0).__aenter__()
        assert petal("forget", model.name).code == 0
        async with swarm.connect() as client:
            assert len(await client.generate(PROMPT, max_new_tokens=2)) == len(PROMPT) + 2


async def test_a_route_goes_round_the_peer_that_contradicts_two_others(tmp_path: Path) -> None:
    model = tiny_llama()
    async with (
        local_swarm(model, [range(0, 2), range(2, 4), range(0, 4)]) as swarm,
        local_swarm(altered(model, tmp_path), [range(0, 4)], join=swarm.address) as others,
        swarm.connect() as client,
    ):
        await all_are_known(client, peers=4)
        assert len(await client.connection.known.look()) == 3
        assert others.peers[0].identity.peer_id not in {stop.peer.peer_id for stop in await client.route()}


async def all_are_known(client: AsyncSwarmModel, peers: int) -> None:
    """Records take a moment to go round."""
    for _ in range(100):
        if len(await client.connection._directory.list()) == peers:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"{peers} records have not come round")


def changed(model: Path, folder: Path, name: str) -> Path:
    """The same model but for all of its weights."""
    copy = shutil.copytree(model, folder / name / model.name)
    shutil.copyfile(tiny_llama(seed=7) / "model.safetensors", copy / "model.safetensors")
    return copy


def renamed(model: Path, folder: Path) -> Path:
    return shutil.copytree(model, folder / "by another name")


async def test_a_name_is_a_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights in another folder are the same model, and both kinds of peers make one route."""
    model = tiny_llama()
    other = renamed(model, tmp_path)
    async with local_swarm(model, [range(0, 4)]) as swarm:
        async with swarm.connect() as client:
            expected = await client.generate(PROMPT, max_new_tokens=4)
        client = await AsyncSwarmModel.connect(str(other), [swarm.address], wait_s=20)
        assert await client.generate(PROMPT, max_new_tokens=4) == expected
        await client.close()
    # Peers that cannot compare weights keep the names that they have.
    monkeypatch.setattr(fellows, "common_name", lambda records, own: own)
    async with (
        local_swarm(model, [range(0, 2)]) as swarm,
        local_swarm(other, [range(2, 4)], join=swarm.address) as others,
        swarm.connect() as client,
    ):
        assert {peer.record().model for peer in (*swarm.peers, *others.peers)} == {model.name, other.name}
        assert await client.generate(PROMPT, max_new_tokens=4) == expected


async def status(swarm: LocalSwarm) -> list[tuple[str, int, int]]:
    """Name, covered blocks and peers of each model."""
    peer = swarm.peers[0]
    models = (await swarm_status(peer.directory, peer.trust))["models"]
    return sorted((model["name"], model["covered"], len(model["peers"])) for model in models)


async def test_a_joiner_takes_what_its_weights_lack_under_whatever_name(tmp_path: Path) -> None:
    """And calls them as the swarm does, so that clients who know the name alone find a whole model."""
    model = tiny_llama()
    other = renamed(model, tmp_path)
    notes: list[str] = []
    async with local_swarm(model, [range(0, 3)]) as swarm, joining(other, swarm, notes) as peer:
        assert peer.blocks == range(3, 4)
        assert peer.record().model == model.name
        assert notes == [
            f"the swarm calls these weights {model.name}, and so does this peer",
            "taking blocks 3:4 of by another name: nobody serves them yet",
        ]
        assert await status(swarm) == [(model.name, 4, 2)]
        async with swarm.connect() as client:
            assert len(await client.generate(PROMPT, max_new_tokens=4)) == 9


async def test_a_joiner_counts_no_other_weights_of_its_name(tmp_path: Path) -> None:
    model = tiny_llama()
    other, notes = changed(model, tmp_path, "a"), list[str]()
    async with local_swarm(model, [range(0, 2)]) as swarm, joining(other, swarm, notes) as peer:
        assert peer.blocks == range(0, 4)
        assert notes[0] == f"the swarm serves other weights under the name {model.name}: their peers do not count here"
        assert await status(swarm) == [(model.name, 2, 1), (model.name, 4, 1)]


@asynccontextmanager
async def joining(model: Path, swarm: LocalSwarm, notes: list[str]) -> AsyncIterator[PeerServer]:
    """A peer that chooses its blocks by itself."""
    with TemporaryDirectory() as folder:
        options = ServeOptions(
            model=str(model), host="127.0.0.1", initial_peers=(swarm.address,), identity=Path(folder) / "identity",
            publish_s=1.0,
        )  # fmt: skip
        peer = PeerServer(options, StartProgress(note=notes.append))
        await peer.start()
        try:
            await swarm.peers[0].directory.list()
            yield peer
        finally:
            await peer.stop()


async def test_other_weights_of_the_same_shape_are_another_model(tmp_path: Path) -> None:
    """Config and tensor names alone make no model: whoever trains one on has both."""
    model = tiny_llama()
    other = renamed(altered(model, tmp_path), tmp_path)
    async with local_swarm(model, [range(0, 4)]) as swarm:
        with pytest.raises(ConnectError) as caught:
            await AsyncSwarmModel.connect(str(other), [swarm.address])
    assert str(caught.value) == (
        f"no peer serves by another name; what is served as {model.name} is built alike, but its weights differ or are "
        f"not on this machine to compare: give the path of that very file, or start one with `petal-serve '{other}'`"
    )
