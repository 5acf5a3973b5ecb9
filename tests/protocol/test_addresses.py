"""Addresses as people mistype them, and how this machine is reached."""

from __future__ import annotations

import socket

import pytest
from petal.protocol import host, paths
from petal.protocol.directory.addresses import check_address, check_peer

DHT = "/ip4/127.0.0.1/tcp/31337/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


@pytest.mark.parametrize(
    "text",
    ["10.0.0.7:1", "localhost:31337", "a-b.example:65535", "[::1]:80", DHT, DHT.replace("ip4/127.0.0.1", "dns/h")],
)
def test_right_addresses_pass(text: str) -> None:
    assert check_peer(text) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("  ", "empty"),
        ("localhost", "'localhost' has no port"),
        ("[::1]", "has no port"),
        ("host:99999", "'99999' in 'host:99999' is no port"),
        ("host:0", "is no port"),
        ("host:", "is no port"),
        ("host:12x", "is no port"),
        ("host:٣", "is no port"),
        ("http://example.org:80/x", "give host:port alone, such as example.org:80"),
        ("http://example.org", "is a web address"),
        ("a:1,b:2", "name several peers by giving the option several times"),
        ("::1:8000", "an IPv6 address stands in brackets"),
        ("999.1.1.1:80", "'999.1.1.1' in"),
        ("two words:80", "is no host"),
        ("[red]:80", "is no host"),
        ("/ip4/127.0.0.1/tcp/1", "is no multiaddr"),
        ("/p2p/Qm", "is no multiaddr"),
        ("│ /ip4/1.2.3.4/tcp/1/p2p/Qm", "no port"),
    ],
)
def test_wrong_addresses_are_told_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_peer(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_announced_address_is_no_multiaddr() -> None:
    with pytest.raises(ValueError):
        check_address(DHT)


class _NoRoute(socket.socket):
    def connect(self, address: object) -> None:
        raise OSError("Network is unreachable")


def test_without_a_default_route_an_interface_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.socket, "socket", _NoRoute)
    monkeypatch.setattr(host, "_by_interface", lambda family: ["10.1.2.3"] if family == socket.AF_INET else ["fd00::7"])
    assert host.outward_host() == "10.1.2.3"
    assert host.outward_host(socket.AF_INET6) == "fd00::7"
    monkeypatch.setattr(host, "_by_interface", lambda family: [])
    assert host.outward_host() == "127.0.0.1"
    assert host.is_loopback(host.outward_host())


def test_what_is_in_the_way_of_a_server_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert host.listening_obstacle("127.0.0.1", taken.getsockname()[1]) == "the port is in use"
    assert host.listening_obstacle("192.0.2.77", 0) == "this machine has no such address"
    assert host.listening_obstacle("127.0.0.1", 0) == ""


def test_hosts_and_ports_are_joined_as_they_are_read() -> None:
    assert host.with_port("::1", 80) == "[::1]:80"
    assert check_address(host.with_port("::1", 80))
    assert host.numeric("localhost") in ("127.0.0.1", "::1")
    with pytest.raises(ValueError, match="no host that this machine knows"):
        host.numeric("no.such.host.invalid")


@pytest.mark.parametrize("kind", ["data", "cache"])
@pytest.mark.parametrize("place", ["~/.local/petal", RuntimeError("could not determine the home directory")])
def test_nobodys_home_is_no_place(kind: str, place: str | RuntimeError, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_user(*_: object, **__: object) -> str:
        if isinstance(place, RuntimeError):
            raise place
        return place

    monkeypatch.setattr(f"platformdirs.user_{kind}_dir", of_user)
    if kind == "data":
        with pytest.raises(OSError, match="set HOME or XDG_DATA_HOME"):
            paths.data_dir()
    else:
        assert paths.cache_dir().is_dir()
        assert paths.cache_dir().is_absolute()
