"""Addresses as people type them: of a peer's gRPC server, or of its DHT node."""

from __future__ import annotations

import re

from .records import is_address

# Of a DHT node, perhaps behind a relay.
_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/(tcp|udp)/\d+(/[^/\s]+)*/p2p/[1-9A-HJ-NP-Za-km-z]+")
EXAMPLE = "192.168.1.7:31337"


def check_peer(text: str) -> str:
    """`text`, if it is a gRPC host:port or a libp2p multiaddr. Raises ValueError, which says what is wrong with it."""
    if text.startswith("/"):
        if not _MULTIADDR.fullmatch(text):
            raise ValueError(f"{text!r} is no multiaddr such as /ip4/1.2.3.4/tcp/31337/p2p/Qm…; paste the whole of it")
        return text
    return check_address(text)


def check_address(text: str) -> str:
    """`text`, if it is a host:port. Raises ValueError, which says what is wrong with it."""
    if is_address(text):
        return text
    raise ValueError(_wrong(text))


def _wrong(text: str) -> str:
    if not text.strip():
        return f"an address is empty; give host:port, such as {EXAMPLE}"
    if "://" in text:
        bare = re.sub(r"^\w*://([^/]*).*", r"\1", text)
        return f"{text!r} is a web address; give host:port alone, such as {bare if is_address(bare) else EXAMPLE}"
    if "," in text:
        return f"{text!r} is no address; name several peers by giving the option several times"
    if text.count(":") > 1 and not text.startswith("["):
        return f"{text!r} is no host:port; an IPv6 address stands in brackets, such as [2001:db8::7]:31337"
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        return f"{text!r} has no port; give host:port, such as {EXAMPLE}"
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        return f"{port!r} in {text!r} is no port; ports are numbers from 1 to 65535"
    return f"{host!r} in {text!r} is no host; give a name or an IP address, such as {EXAMPLE}"
