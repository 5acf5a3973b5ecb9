"""One DHT with peers of several models, and of one model in several dtypes: a client takes what is compatible."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
from petal.client.routing.route import NoRoute, Route, choose_route, repair_route
from petal.client.swarm import AsyncSwarmModel, ConnectError
from petal.protocol import petal_pb2 as pb

from ..support.swarms import LocalSwarm, local_swarm
from ..support.tiny import tiny_llama

PROMPT = [5, 17, 90, 33, 2, 8]
SETTINGS = {"max_new_tokens": 24, "temperature": 0.8, "seed": 3, "eos_token_id": -1}
WHOLE, FRONT, BACK = range(0, 4), range(0, 2), range(2, 4)


@asynccontextmanager
async def swarms(*served: tuple[int, str, Sequence[range]]) -> AsyncIterator[list[LocalSwarm]]:
    """Groups of peers in one DHT: the model's seed, dtype and spans of each."""
    async with AsyncExitStack() as stack:
        groups: list[LocalSwarm] = []
        for seed, dtype, spans in served:
            join = groups[0].address if groups else None
            groups.append(await stack.enter_async_context(local_swarm(tiny_llama(seed), spans, join, dtype=dtype)))
        yield groups


async def knows(client: AsyncSwarmModel, peers: int) -> None:
    """Wait until the directory tells of so many peers."""
    for _ in range(100):
        if len(await client.connection.known.look()) >= peers:
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the directory does not tell")


def dtypes(route: Route) -> list[str]:
    return [stop.peer.dtype for stop in route]


async def test_each_client_finds_its_own_model() -> None:
    alone = []
    for seed in (0, 1):
        async with swarms((seed, "float32", [WHOLE])) as [only], only.connect() as client:
            alone.append(await client.generate(PROMPT, **SETTINGS))
    assert alone[0] != alone[1]
    async with swarms((0, "float32", [FRONT, BACK]), (1, "float32", [BACK, FRONT])) as both:
        together = []
        for group, other in (both, both[::-1]):
            client = await AsyncSwarmModel.connect(group.model, [other.address], wait_s=20)
            together.append(await client.generate(PROMPT, **SETTINGS))
            mine = {peer.identity.peer_id for peer in group.peers}
            assert {stop.peer.peer_id for stop in await client.route()} == mine
            await client.close()
    assert together == alone


async def test_a_route_keeps_to_one_dtype_and_the_cheapest_decides() -> None:
    async with (
        swarms((0, "float32", [FRONT, BACK]), (0, "bf16", [BACK, FRONT])) as [single, half],
        single.connect() as client,
    ):
        await knows(client, 4)
        for near in (single, half, single):
            # The nearest two peers of all: either both of one dtype, or one of each, which no route may mix.
            client.connection.known.rtt_s = dict.fromkeys(client.connection.known.rtt_s, 0.5)
            client.connection.known.rtt_s.update({peer.identity.peer_id: 0.001 for peer in near.peers})
            assert dtypes(await client.route()) == [near.peers[0].options.dtype] * 2
            assert len(await client.generate(PROMPT, **SETTINGS)) == len(PROMPT) + 24
        client.connection.known.rtt_s = dict.fromkeys(client.connection.known.rtt_s, 0.5)
        client.connection.known.rtt_s.update({group.peers[0].identity.peer_id: 0.001 for group in (single, half)})
        assert len(set(dtypes(await client.route()))) == 1


async def test_mixing_has_to_be_allowed() -> None:
    async with swarms((0, "float32", [FRONT]), (0, "bf16", [BACK])) as [single, _]:
        needed = r"blocks 2-3 are served in bf16 only, the others in float32; --allow-mixed"
        async with single.connect(allow_mixed=True) as client:
            assert dtypes(await client.route()) == ["float32", "bf16"]
            assert len(await client.generate(PROMPT, **SETTINGS)) == len(PROMPT) + 24
        with pytest.raises(ConnectError, match=needed):
            async with single.connect(wait_s=0.5):
                pass
        with pytest.raises(ValueError, match="exact and allow_mixed contradict each other"):
            await AsyncSwarmModel.connect(single.model, [single.address], exact=True, allow_mixed=True)


@pytest.mark.parametrize("allow_mixed", [False, True])
async def test_who_takes_over(allow_mixed: bool) -> None:
    """The tail fails, and the only other peer with its blocks computes in another dtype."""
    async with (
        swarms((0, "float32", [FRONT, BACK]), (0, "bf16", [BACK])) as [single, _],
        single.connect(allow_mixed=allow_mixed) as client,
    ):
        await knows(client, 3)
        client.connection.defaults = replace(client.connection.defaults, wait_s=0.5)
        pieces = client.stream(PROMPT, drafter="none", **SETTINGS)
        first = await anext(pieces)
        assert dtypes(await client.route()) == ["float32"] * 2
        await single.peers[1]._grpc.stop(None)
        if not allow_mixed:
            with pytest.raises(NoRoute, match="hosts blocks 2-3 any more but in bf16, which --allow-mixed would"):
                [piece async for piece in pieces]
            return
        rest = [piece async for piece in pieces]
        assert sum(len(piece.ids) for piece in [first, *rest]) == 24
        [event] = [event for piece in rest for event in piece.events]
        assert not event.alike
        assert "the text is not exact" in str(event)


# Routes by themselves.


def peer(name: str, blocks: range, dtype: str = "float32", **fields: object) -> pb.PeerRecord:
    return pb.PeerRecord(
        peer_id=name,
        addresses=["127.0.0.1:1"],
        n_blocks=4,
        start=blocks.start,
        end=blocks.stop,
        dtype=dtype,
        state=pb.ONLINE,
        max_sessions=4,
        throughput=100,
        **fields,
    )


def names(route: Route) -> list[str]:
    return [stop.peer.peer_id for stop in route]


def test_quantization_is_a_kind_too() -> None:
    records = [peer("a", FRONT), peer("b", BACK, quantization="q4_0")]
    with pytest.raises(NoRoute, match=r"blocks 2-3 are served in q4_0 \(float32\) only, the others in float32"):
        choose_route(records, {})
    assert names(choose_route(records, {}, mixed=True)) == ["a", "b"]


def test_kinds_are_mixed_only_where_no_kind_has_every_block() -> None:
    records = [peer("near", FRONT), peer("near bf16", BACK, "bf16"), peer("far", BACK)]
    rtt_s = {"near": 0.0, "near bf16": 0.0, "far": 2.0}
    assert names(choose_route(records, rtt_s, mixed=True)) == ["near", "far"]


def test_a_block_that_nobody_hosts_is_no_matter_of_kinds() -> None:
    with pytest.raises(NoRoute, match="nobody hosts block 3;"):
        choose_route([peer("a", FRONT), peer("b", range(2, 3), "bf16")], {}, mixed=True)


def test_exact_mode_keeps_to_one_arithmetic_and_takes_the_one_that_has_every_block() -> None:
    def exact(name: str, blocks: range, numerics: str) -> pb.PeerRecord:
        return peer(name, blocks, features=["exact"], numerics=numerics)

    records = [exact("a", FRONT, "x"), exact("b", FRONT, "x"), exact("c", FRONT, "y"), exact("d", BACK, "y")]
    assert names(choose_route(records, {}, exact=True)) == ["c", "d"]
    with pytest.raises(NoRoute, match="blocks 2-3 are served in y only, the others in x; exact mode keeps to one"):
        choose_route([*records[:2], records[3]], {}, exact=True)
    with pytest.raises(NoRoute, match="no peer promises exact mode"):
        choose_route([peer("e", WHOLE)], {}, exact=True)


def test_a_repair_prefers_peers_of_the_same_kind_and_the_same_bytes() -> None:
    digests = {"block_digests": [b"d" * 32] * 2}
    route = choose_route([peer("a", FRONT, **digests), peer("b", BACK, **digests)], {})
    other = peer("other", BACK, "bf16", **digests)
    alike = peer("alike", BACK, **digests)
    foreign = peer("foreign", BACK, "bf16", block_digests=[b"e" * 32] * 2)

    def repaired(*records: pb.PeerRecord) -> list[str]:
        return names(repair_route(route, route[:1], records, {"alike": 9.0}, mixed=True))

    assert repaired(other, alike) == ["a", "alike"]
    assert repaired(other, foreign) == ["a", "other"]
    with pytest.raises(NoRoute, match=r"hosts blocks 2-3 any more$"):
        repaired(foreign)
