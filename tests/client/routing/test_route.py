import itertools
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from petal.client.routing.route import (
    DEFAULT_BLOCK_S,
    DEFAULT_RTT_S,
    NoRoute,
    by_model,
    choose_route,
    describe_blocks,
    missing_blocks,
    repair_route,
)
from petal.protocol import petal_pb2 as pb


def peer(name, start, end, n_blocks=6, *, speed=100.0, free=1000, sessions=0, state=pb.ONLINE, digest=b"m"):
    return pb.PeerRecord(
        peer_id=name,
        addresses=["127.0.0.1:1"],
        model_digest=digest,
        n_blocks=n_blocks,
        start=start,
        end=end,
        throughput=speed,
        cache_tokens_free=free,
        sessions=sessions,
        max_sessions=4,
        state=state,
    )


def hops(route):
    return [(stop.peer.peer_id, stop.blocks.start, stop.blocks.stop) for stop in route]


def cost_of(stops, rtt_s, reserve):
    total = 0.0
    for record, start, end in stops:
        per_block = 1 / (record.throughput * (record.end - record.start)) if record.throughput else DEFAULT_BLOCK_S
        full = record.cache_tokens_free < reserve or record.sessions >= record.max_sessions
        total += rtt_s.get(record.peer_id, DEFAULT_RTT_S) + per_block * (end - start) + 1000 * full
    return total


def every_path(records, n_blocks):
    """All ways to cut the blocks into parts and to give each part to a peer that holds it."""
    for cuts in itertools.chain.from_iterable(
        itertools.combinations(range(1, n_blocks), parts) for parts in range(n_blocks)
    ):
        edges = [0, *cuts, n_blocks]
        parts = list(itertools.pairwise(edges))
        holders = [[r for r in records if r.start <= a and b <= r.end and r.state == pb.ONLINE] for a, b in parts]
        for chosen in itertools.product(*holders):
            yield [(record, a, b) for record, (a, b) in zip(chosen, parts, strict=True)]


@st.composite
def swarms(draw):
    n_blocks = draw(st.integers(1, 5))
    records = []
    for i in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, n_blocks - 1))
        records.append(
            peer(
                f"peer{i}",
                start,
                draw(st.integers(start + 1, n_blocks)),
                n_blocks,
                speed=draw(st.sampled_from([0.0, 0.5, 10.0, 200.0])),
                free=draw(st.sampled_from([10, 1000])),
                sessions=draw(st.sampled_from([0, 0, 4])),
                state=draw(st.sampled_from([pb.ONLINE, pb.ONLINE, pb.ONLINE, pb.JOINING])),
            )
        )
    rtt_s = {r.peer_id: draw(st.sampled_from([0.001, 0.03, 0.4])) for r in records if draw(st.booleans())}
    return n_blocks, records, rtt_s


@settings(max_examples=300, deadline=None)
@given(swarms(), st.sampled_from([0, 100]))
def test_the_cheapest_path(swarm, reserve):
    n_blocks, records, rtt_s = swarm
    paths = list(every_path(records, n_blocks))
    if not paths:
        with pytest.raises(NoRoute):
            choose_route(records, rtt_s, reserve)
        return
    stops = [(stop.peer, stop.blocks.start, stop.blocks.stop) for stop in choose_route(records, rtt_s, reserve)]
    assert [block for _, a, b in stops for block in range(a, b)] == list(range(n_blocks))
    names = [record.peer_id for record, _, _ in stops]
    assert len(names) == len(set(names)), "no peer takes one session twice"
    assert all(r.start <= a < b <= r.end and r.state == pb.ONLINE for r, a, b in stops)
    cheapest = min(paths, key=lambda path: cost_of(path, rtt_s, reserve))
    cost, least = cost_of(stops, rtt_s, reserve), cost_of(cheapest, rtt_s, reserve)
    assert cost >= least - 1e-9
    if len({record.peer_id for record, _, _ in cheapest}) == len(cheapest):
        assert math.isclose(cost, least)


def test_a_peer_is_not_visited_twice_for_a_quick_one_in_between():
    records = [peer("slow", 0, 6, speed=0.1), peer("quick", 2, 4, speed=1000)]
    assert hops(choose_route(records, {"slow": 0.001, "quick": 0.001})) == [("slow", 0, 6)]
    free_hops = {"slow": 0.0, "quick": 0.0}
    assert hops(choose_route(records, free_hops)) == [("slow", 0, 6)]


def test_part_of_a_span():
    records = [peer("first", 0, 4), peer("second", 2, 6)]
    route = choose_route(records, {})
    assert [block for stop in route for block in stop.blocks] == list(range(6))
    quick_second = [peer("first", 0, 4), peer("second", 2, 6, speed=10_000)]
    assert hops(choose_route(quick_second, {})) == [("first", 0, 2), ("second", 2, 6)]
    assert choose_route(quick_second, {})[0].name == "first [0:2]"


def test_near_peers_are_preferred():
    records = [peer("far", 0, 6), peer("near", 0, 6), peer("unknown", 0, 6)]
    assert hops(choose_route(records, {"far": 0.2, "near": 0.01})) == [("near", 0, 6)]
    assert hops(choose_route(records, {"far": 0.2, "near": 0.1})) == [("unknown", 0, 6)]


def test_one_long_hop_is_better_than_many_short_ones():
    records = [*(peer(f"{i}", i, i + 1) for i in range(6)), peer("whole", 0, 6)]
    assert hops(choose_route(records, {})) == [("whole", 0, 6)]


@pytest.mark.parametrize("full", [{"free": 50}, {"sessions": 4}], ids=str)
def test_full_peers_are_the_last_resort(full):
    records = [peer("full", 0, 6, speed=10_000, **full), peer("slow", 0, 3, speed=1), peer("slower", 3, 6, speed=0.5)]
    rtt_s = {"full": 0.001, "slow": 1.0, "slower": 1.0}
    assert hops(choose_route(records, rtt_s, 100)) == [("slow", 0, 3), ("slower", 3, 6)]
    assert hops(choose_route(records[:2], rtt_s, 100))[-1][0] == "full"


def test_a_missing_route_names_its_gaps():
    with pytest.raises(NoRoute, match=r"nobody hosts blocks 0-1 and 4; start a peer with `petal-serve`"):
        choose_route([peer("a", 2, 4), peer("b", 5, 6), peer("c", 0, 6, state=pb.JOINING)], {})
    with pytest.raises(NoRoute, match=r"nobody hosts block 5;"):
        choose_route([peer("a", 0, 5)], {})
    with pytest.raises(NoRoute, match=r"nobody hosts blocks 0-5;"):
        choose_route([peer("a", 0, 6, state=pb.DRAINING)], {})
    with pytest.raises(NoRoute, match="nobody hosts every block"):
        choose_route([], {})


def test_missing_blocks():
    assert missing_blocks([], 3) == [range(3)]
    assert missing_blocks([peer("a", 0, 6)], 6) == []
    assert missing_blocks([peer("a", 1, 2), peer("b", 3, 5)], 6) == [range(1), range(2, 3), range(5, 6)]
    assert describe_blocks([range(10), range(20, 30)]) == "blocks 0-9 and 20-29"
    assert describe_blocks([range(1), range(2, 3)]) == "blocks 0 and 2"
    assert describe_blocks([range(3, 4)]) == "block 3"


def test_records_are_grouped_by_their_weights():
    a, b, c = peer("a", 0, 6), peer("b", 0, 6, digest=b"n"), peer("c", 0, 6)
    assert by_model([a, b, c]) == {b"m": [a, c], b"n": [b]}


# Repair.


def alike(name, start, end, **fields):
    record = peer(name, start, end, **fields)
    record.dtype, record.quantization, record.numerics = "float32", "none", "native"
    record.features.append("exact")
    return record


ROUTE = choose_route([alike("a", 0, 2), alike("b", 2, 4), alike("c", 4, 6)], {})


def repaired(kept, records, **options):
    stops = [stop for stop in ROUTE if stop.peer.peer_id in kept]
    return hops(repair_route(ROUTE, stops, records, {}, **options))


def test_a_stop_that_fails_is_replaced_and_the_others_stay():
    records = [alike("a", 0, 2), alike("x", 1, 5), alike("c", 4, 6)]
    assert repaired("ac", records) == [("a", 0, 2), ("x", 2, 4), ("c", 4, 6)]
    # Those that stay need no record: they are there.
    assert repaired("ac", records[1:2]) == [("a", 0, 2), ("x", 2, 4), ("c", 4, 6)]


def test_neighbours_that_fail_are_one_gap():
    assert repaired("c", [alike("x", 0, 4)]) == [("x", 0, 4), ("c", 4, 6)]
    halves = [alike("x", 0, 3), alike("y", 3, 4)]
    assert repaired("c", halves) == [("x", 0, 3), ("y", 3, 4), ("c", 4, 6)]


def test_two_gaps_never_get_one_peer():
    records = [alike("x", 0, 6), alike("y", 4, 6)]
    assert repaired("b", records) == [("x", 0, 2), ("b", 2, 4), ("y", 4, 6)]


def test_a_peer_that_stays_takes_more_where_nobody_else_can():
    assert repaired("b", [alike("b", 0, 6)]) == [("b", 0, 6)]
    assert repaired("ac", [alike("a", 0, 4), alike("c", 4, 6)]) == [("a", 0, 4), ("c", 4, 6)]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"quantization": "int8"},
        {"state": pb.DRAINING},
        {"block_digests": [b"d" * 32] * 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_only_a_peer_that_computes_alike_takes_over(change):
    other = alike("x", 2, 4)
    other.MergeFrom(pb.PeerRecord(**change))
    with pytest.raises(NoRoute, match=r"nobody who can be reached hosts blocks 2-3 any more"):
        repaired("ac", [alike("a", 0, 2), other, alike("c", 4, 6)])
    assert repaired("ac", [other, alike("y", 2, 4, speed=0.01)])[1] == ("y", 2, 4)


@pytest.mark.parametrize("field", ["numerics", "features"])
def test_in_exact_mode_the_arithmetic_is_the_same(field):
    other = alike("x", 2, 4)
    other.ClearField(field)
    assert repaired("ac", [other])[1] == ("x", 2, 4)
    with pytest.raises(NoRoute, match="nobody who can be reached hosts blocks 2-3"):
        repaired("ac", [other], exact=True)


@settings(max_examples=200, deadline=None)
@given(swarms(), st.data())
def test_a_repaired_route_is_a_route(swarm, data):
    n_blocks, records, rtt_s = swarm
    try:
        route = choose_route(records, rtt_s)
    except NoRoute:
        return
    kept = [stop for stop in route if data.draw(st.booleans())]
    lost = {stop.peer.peer_id for stop in route} - {stop.peer.peer_id for stop in kept}
    others = [record for record in records if record.peer_id not in lost]
    try:
        new = repair_route(route, kept, others, rtt_s)
    except NoRoute:
        assert missing_blocks(others, n_blocks)
        return
    assert [block for stop in new for block in stop.blocks] == list(range(n_blocks))
    names = [stop.peer.peer_id for stop in new]
    assert len(names) == len(set(names))
    assert not lost & set(names)
