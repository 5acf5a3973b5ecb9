"""Who is used, who is not, and when a peer that failed is used again."""

from __future__ import annotations

import pytest
from petal.client.routing.peers import ConnectError, KnownPeers
from petal.client.routing.route import NoRoute
from petal.protocol.directory.directory import DirectoryError
from petal.protocol.trust.trust import PublicTrust

from ...support.routing import Book, Network, names


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    return Network(monkeypatch)


@pytest.fixture
def book() -> Book:
    book = Book()
    for name in ("a", "b"):
        book.publish(name, 1)
    return book


async def test_a_peer_that_failed_is_used_again_with_a_new_record_and_an_answer(book: Book, network: Network) -> None:
    peers = KnownPeers(book, PublicTrust(), "model", None)
    await peers.look()
    assert names(peers) == {"a", "b"}
    peers.ban("a")
    assert names(peers) == {"b"}
    await peers.look()
    assert names(peers) == {"b"}, "its old record says nothing new"
    network.silent = {"a"}
    book.publish("a", 2)
    await peers.look()
    assert names(peers) == {"b"}, "a peer behind a cut link publishes, but does not answer"
    network.silent = set()
    book.publish("a", 3)
    await peers.look()
    assert names(peers) == {"a", "b"}


async def test_who_never_answered_is_not_used(book: Book, network: Network) -> None:
    network.silent = {"b"}
    peers = KnownPeers(book, PublicTrust(), "model", None)
    await peers.look()
    assert names(peers) == {"a"}


async def test_each_peer_is_pinged_once(book: Book, network: Network) -> None:
    peers = KnownPeers(book, PublicTrust(), "model", None)
    await peers.look()
    book.publish("a", 2)
    book.publish("c", 1)
    await peers.look()
    assert network.pinged == ["a", "b", "c"]


async def test_where_nobody_else_is_left_an_answer_is_enough(book: Book, network: Network) -> None:
    peers = KnownPeers(book, PublicTrust(), "model", None)
    await peers.look()
    for name in ("a", "b"):
        peers.ban(name)
    with pytest.raises(NoRoute, match="none of the 2 peers that serve model can be reached"):
        peers.usable()
    network.silent = {"b"}
    await peers.try_banned()
    assert names(peers) == {"a"}


async def test_without_a_directory_the_peers_known_so_far_stay(book: Book, network: Network) -> None:
    peers = KnownPeers(book, PublicTrust(), "model", None)
    await peers.look()
    book.error = DirectoryError("nobody answers")
    with pytest.raises(ConnectError, match="nobody answers"):
        await peers.look()
    assert names(peers) == {"a", "b"}
