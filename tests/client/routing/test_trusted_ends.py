import pytest
from petal.client.cli.explain import explain
from petal.client.routing.route import NoRoute, choose_route
from petal.client.routing.trusted_ends import TrustedEnds
from petal.protocol import petal_pb2 as pb
from petal.protocol.trust.trust import PublicTrust


class Labelled(PublicTrust):
    """A certificate's bytes are its owner's lab."""

    def labels_of(self, certificates):
        return {"lab": certificates[0].decode()}


def peer(name: str, lab: str, start: int, end: int) -> pb.PeerRecord:
    return pb.PeerRecord(
        peer_id=name,
        n_blocks=6,
        start=start,
        end=end,
        addresses=[name],
        state=pb.ONLINE,
        certificates=[lab.encode()],
        block_digests=[bytes([block]) for block in range(start, end)],
        cache_tokens_free=100,
        max_sessions=1,
        throughput=100.0 if lab == "mallory" else 1.0,
    )


SWARM = [peer("near", "mallory", 0, 6), peer("head", "oxford", 0, 2), peer("tail", "oxford", 5, 6)]
OXFORD = TrustedEnds(Labelled(), frozenset({"lab=oxford"}))


def test_without_labels_the_fastest_takes_all():
    assert [stop.peer.peer_id for stop in choose_route(TrustedEnds(Labelled()).limit(SWARM), {})] == ["near"]


def test_ends_run_on_labelled_peers_only():
    route = choose_route(OXFORD.limit(SWARM), {})
    assert [stop.peer.peer_id for stop in route] == ["head", "near", "tail"]
    assert route[1].blocks.start > 0
    assert route[1].blocks.stop < 6


def test_digests_stay_with_their_blocks():
    [inner] = [record for record in OXFORD.limit(SWARM) if record.peer_id == "near"]
    assert list(inner.block_digests) == [bytes([block]) for block in range(1, 5)]
    assert SWARM[0].start == 0


def test_no_route_where_nobody_has_the_label():
    with pytest.raises(NoRoute, match="block"):
        choose_route(TrustedEnds(Labelled(), frozenset({"lab=elsewhere"})).limit(SWARM), {})


def test_it_says_who_sees_what():
    first, middle, last = explain(choose_route(OXFORD.limit(SWARM), {}), OXFORD, local_ends=False)
    assert "your prompt as tokens" in first["sees"]
    assert middle["sees"] == ["activations"]
    assert any("answer" in seen for seen in last["sees"])
    assert (first["labels"], middle["labels"]) == (["lab=oxford"], ["lab=mallory"])
    first, _, last = explain(choose_route(OXFORD.limit(SWARM), {}), OXFORD, local_ends=True)
    assert not any("prompt" in seen for seen in [*first["sees"], *last["sees"]])
