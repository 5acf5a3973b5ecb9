"""Weights are those that were used first: in this run, in later ones, and among the peers of a route."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from petal.client.routing import pins
from petal.client.routing.peers import ConnectError, KnownPeers
from petal.client.routing.pins import Pins, forget
from petal.client.routing.route import NoRoute, Stop
from petal.protocol import petal_pb2 as pb
from petal.protocol.directory.digests import agreeing, by_weights, weights_of
from petal.protocol.trust.trust import PublicTrust

from ...support.routing import Book, Network, names

GOOD, BAD, WORSE = b"g" * 32, b"b" * 32, b"w" * 32


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


def held(*digests: bytes, start: int = 0, **fields: object) -> dict:
    """What a record says of the blocks from `start` on."""
    return {"start": start, "end": start + len(digests), "block_digests": digests, "n_blocks": 8, **fields}


def records(**spans: dict) -> list[pb.PeerRecord]:
    return [pb.PeerRecord(peer_id=name, **{"model_digest": b"m", **fields}) for name, fields in spans.items()]


def agreed(found: Sequence[pb.PeerRecord], pinned: dict[str, str] | None = None) -> set[str]:
    return {record.peer_id for record in agreeing(found, pinned or {})}


def test_the_peer_that_contradicts_the_others_is_left_out() -> None:
    found = records(a=held(GOOD, GOOD), b=held(GOOD, start=1), c=held(BAD, GOOD, start=1), d=held(GOOD, start=2))
    assert agreed(found) == {"a", "b", "d"}


def test_who_agrees_is_left_in() -> None:
    found = records(a=held(GOOD, GOOD), b=held(GOOD, start=1), d=held(GOOD, start=2))
    assert agreed(found) == {"a", "b", "d"}


def test_of_two_that_contradict_each_other_one_stays_whole() -> None:
    assert len(agreed(records(a=held(GOOD, BAD, WORSE), b=held(BAD, WORSE, GOOD)))) == 1


def test_what_is_pinned_outweighs_any_number() -> None:
    first, *others = records(a=held(GOOD), b=held(BAD), c=held(BAD), d=held(BAD))
    assert agreed([first, *others]) == {"b", "c", "d"}
    assert agreed([first, *others], weights_of(first)) == {"a"}
    assert agreed(others, weights_of(first)) == set()


def test_a_record_without_digests_contradicts_those_that_have_them() -> None:
    assert agreed(records(a=held(GOOD), b=held(GOOD), c={"start": 0, "end": 1, "n_blocks": 8})) == {"a", "b"}


def test_embedding_and_head_count() -> None:
    ends = {"n_blocks": 1, "norm_digest": GOOD, "head_digest": GOOD}
    good = held(GOOD, **ends, embedding_digest=GOOD)
    found = records(a=good, b=good, c={**good, "embedding_digest": BAD}, d={**good, "head_digest": BAD})
    assert agreed(found) == {"a", "b"}


def test_another_quantization_is_no_way_around() -> None:
    found = records(a=held(GOOD, quantization="none"), b=held(GOOD, quantization="int8"))
    assert agreed(found) == {"a", "b"}
    assert agreed([*found, *records(c=held(BAD, quantization="int4"))]) == {"a", "b"}


async def used(book: Book) -> KnownPeers:
    """A client that takes the first peer it may."""
    peers = KnownPeers(book, PublicTrust(), "org/model", None)
    await peers.look()
    [first, *_] = peers.usable()
    peers.pin((Stop(first, range(first.start, first.end)),))
    return peers


async def test_what_was_used_first_is_used_in_later_runs() -> None:
    book = Book()
    book.publish("a", 1, **held(GOOD))
    assert names(await used(book)) == {"a"}
    book.publish("b", 1, **held(BAD))
    book.publish("c", 1, **held(BAD))
    assert names(await used(book)) == {"a"}, "two that came later do not outweigh it"
    del book.records["a"]
    later = KnownPeers(book, PublicTrust(), "org/model", None)
    await later.look()
    with pytest.raises(NoRoute, match="no peer serves the known weights of org/model"):
        later.usable()
    assert "2 of its peers hold other weights" in later.left_out
    assert "`petal forget org/model` accepts them" in later.left_out
    assert forget("org/model")
    assert names(await used(book)) == {"b", "c"}
    assert not forget("org/another")


async def test_without_pins_whoever_comes_last_would_be_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    monkeypatch.setattr(Pins, "keep", lambda *_: None)
    book = Book()
    book.publish("a", 1, **held(GOOD))
    assert names(await used(book)) == {"a"}
    book.publish("b", 1, **held(BAD))
    book.publish("c", 1, **held(BAD))
    assert names(await used(book)) == {"b", "c"}


async def test_a_name_that_comes_to_stand_for_another_model_is_refused() -> None:
    book = Book()
    book.publish("a", 1, **held(GOOD))
    await used(book)
    book.publish("a", 2, **held(GOOD), model_digest=b"another")
    with pytest.raises(ConnectError, match=r"other weights under the name org/model.*`petal forget org/model`"):
        await used(book)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\0b", "..", "", "x" * 5000])
def test_no_name_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    Pins(name).keep(b"m", {"part": "00"})
    [file] = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.parent == tmp_path / "home" / "petal" / "pins"
    assert Pins(name).digests == {"model": b"m".hex(), "part": "00"}
    assert os.stat(file).st_mode & 0o777 == 0o600


def test_what_was_pinned_first_stays() -> None:
    one, other = Pins("model"), Pins("model")
    one.keep(b"m", {"1": "aa"})
    other.keep(b"n", {"1": "bb", "2": "cc"})
    assert Pins("model").digests == other.digests == {"model": b"m".hex(), "1": "aa", "2": "cc"}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"digests": {"a": 1}}', '{"digests": {"a": "zz"}}'])
def test_a_damaged_file_is_not_overwritten(text: str) -> None:
    path = pins.path_of("model")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ValueError, match="restore or delete it; without it model is pinned anew"):
        Pins("model")
    assert path.read_text() == text


def test_where_nothing_can_be_written_it_says_so_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(pins, "write_private", refuse)
    kept = Pins("model")
    kept.keep(b"m", {"1": "aa"})
    assert kept.digests["1"] == "aa"
    assert "for as long as this runs only: read-only" in caplog.text


def test_weights_tell_models_apart_and_names_only_where_weights_say_nothing() -> None:
    def groups(**spans: dict) -> list[str]:
        return ["".join(sorted(r.peer_id for r in group)) for group in by_weights(records(**spans))]

    half, rest, whole = held(GOOD, GOOD, model="x"), held(GOOD, start=2, model="y"), held(GOOD, GOOD, GOOD, model="z")
    assert groups(a=half, b=rest) == ["a", "b"]
    assert groups(a=half, b={**rest, "model": "x"}) == ["ab"]
    assert groups(a=half, b=rest, c=whole) == ["abc"]
    assert sorted(groups(a=half, b=held(GOOD, BAD, model="x"))) == ["a", "b"]
    assert groups(a=half, b=held(BAD, model="x"), c=whole) == ["ac", "b"]
    assert sorted(groups(a=half, b={**half, "model_digest": b"n"})) == ["a", "b"]
