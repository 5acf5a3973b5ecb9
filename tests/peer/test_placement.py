import hypothesis.strategies as st
import pytest
from hypothesis import given
from petal.peer.placement import block_supply, choose_span
from petal.protocol import petal_pb2 as pb


def peer(start, end, throughput=10.0, state=pb.ONLINE):
    return pb.PeerRecord(start=start, end=end, throughput=throughput, state=state)


def join(records, n_blocks, size, throughput=10.0):
    span = choose_span(records, n_blocks, size)
    return [*records, peer(span.start, span.stop, throughput, pb.JOINING)]


N_BLOCKS = 12
SPANS = st.tuples(st.integers(0, N_BLOCKS - 1), st.integers(1, N_BLOCKS)).map(lambda s: (s[0], min(N_BLOCKS, sum(s))))
SWARMS = st.lists(
    st.builds(lambda span, speed: peer(*span, speed), SPANS, st.sampled_from([1.0, 2.0, 5.0])), max_size=6
)


def test_supply_counts_who_is_or_soon_will_be_there():
    records = [
        peer(0, 2, 5.0),
        peer(1, 3, 2.0, pb.JOINING),
        peer(0, 9, 0.0),
        *(peer(0, 4, 9.0, state) for state in pb.PeerState.values() if state not in (pb.ONLINE, pb.JOINING)),
    ]
    assert block_supply(records, 4) == [6.0, 8.0, 3.0, 1.0]


@pytest.mark.parametrize(("n_blocks", "sizes"), [(30, [10] * 3), (32, [10] * 4), (30, [30]), (7, [3, 3, 3]), (5, [9])])
def test_joining_peers_cover_the_model(n_blocks, sizes):
    records = []
    for size in sizes:
        records = join(records, n_blocks, size)
    assert min(block_supply(records, n_blocks)) > 0


def test_the_weakest_blocks_come_first():
    records = [peer(0, 10), peer(10, 20), peer(20, 30), peer(0, 10), peer(20, 30)]
    assert choose_span(records, 30, 10) == range(10, 20)
    assert choose_span(records, 30, 4) == range(10, 14)
    assert choose_span([peer(0, 10), peer(12, 20)], 20, 5) == range(7, 12)
    assert choose_span([peer(0, 10, 1.0), peer(10, 20, 9.0)], 20, 10) == range(10)


@given(SWARMS, st.integers(1, 15))
def test_the_span_fits_and_no_other_is_weaker(records, size):
    span = choose_span(records, N_BLOCKS, size)
    assert len(span) == min(size, N_BLOCKS)
    assert 0 <= span.start < span.stop <= N_BLOCKS
    supply = block_supply(records, N_BLOCKS)
    windows = [sorted(supply[s : s + len(span)]) for s in range(N_BLOCKS - len(span) + 1)]
    assert sorted(supply[span.start : span.stop]) == min(windows)
    assert span.start == windows.index(min(windows))
    assert min(supply) in supply[span.start : span.stop], "the weakest block of all gets help"


@given(SWARMS, st.lists(st.integers(1, N_BLOCKS), max_size=8))
def test_the_weakest_point_never_falls_and_rises_in_the_end(records, sizes):
    weakest = [min(block_supply(records, N_BLOCKS))]
    for size in sizes:
        records = join(records, N_BLOCKS, size)
        weakest.append(min(block_supply(records, N_BLOCKS)))
    assert weakest == sorted(weakest)
    for _ in range(N_BLOCKS):
        records = join(records, N_BLOCKS, 1)
    assert min(block_supply(records, N_BLOCKS)) > weakest[-1]
