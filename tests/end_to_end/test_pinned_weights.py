"""A real swarm whose weights change under the same name, config and tensor names: only their bytes tell."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from petal.client.routing.peers import ConnectError
from petal.client.swarm import AsyncSwarmModel

from ..support.commands import petal
from ..support.swarms import local_swarm
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
        await others.peers[0].directory.list()
        assert len(await client.connection.known.look()) == 3
        assert others.peers[0].identity.peer_id not in {stop.peer.peer_id for stop in await client.route()}


def renamed(model: Path, folder: Path) -> Path:
    return shutil.copytree(model, folder / "by another name")


async def test_a_name_is_a_label(tmp_path: Path) -> None:
    """The same weights in another folder are the same model, and both kinds of peers make one route."""
    model = tiny_llama()
    other = renamed(model, tmp_path)
    async with local_swarm(model, [range(0, 4)]) as swarm:
        async with swarm.connect() as client:
            expected = await client.generate(PROMPT, max_new_tokens=4)
        client = await AsyncSwarmModel.connect(str(other), [swarm.address], wait_s=20)
        assert await client.generate(PROMPT, max_new_tokens=4) == expected
        await client.close()
    async with (
        local_swarm(model, [range(0, 2)]) as swarm,
        local_swarm(other, [range(2, 4)], join=swarm.address),
        swarm.connect() as client,
    ):
        assert await client.generate(PROMPT, max_new_tokens=4) == expected


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
