"""The connections that others hold to this peer. gRPC neither lists nor closes them: the system does."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import stat
import time
from collections import Counter
from collections.abc import Iterator
from urllib.parse import unquote

from ..limits.connection_budget import Connection, connection_budget, to_close

LOOK_EVERY_S = 0.5
_FILES = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"


class Connections:
    """Those to one port of this process, within a budget. They are named as gRPC names them: "ipv4:1.2.3.4:56"."""

    def __init__(self) -> None:
        self.budget = connection_budget(len(os.listdir(_FILES)))
        self.port = 0
        self._serving: Counter[str] = Counter()
        self._since: dict[str, float] = {}

    @contextlib.contextmanager
    def serving(self, name: str) -> Iterator[None]:
        """A session or a link runs over this connection meanwhile: it is not closed to make room."""
        name = unquote(name)
        self._serving[name] += 1
        try:
            yield
        finally:
            self._serving[name] -= 1
            if not self._serving[name]:
                del self._serving[name]

    def hang_up(self, *names: str) -> None:
        """Close connections, whatever runs over them."""
        unwanted = {unquote(name) for name in names}
        for name, connection in self._open():
            if name in unwanted:
                with contextlib.suppress(OSError):  # it has gone by itself
                    connection.shutdown(socket.SHUT_RDWR)

    async def keep_room(self) -> None:
        """Close what serves nobody where there are too many, for as long as this runs."""
        while True:
            if len(os.listdir(_FILES)) > self.budget / 2:
                self.hang_up(*to_close(self._list(), self.budget))
            await asyncio.sleep(LOOK_EVERY_S)

    def _list(self) -> list[Connection]:
        now = time.monotonic()
        self._since = {name: self._since.get(name, now) for name, _ in self._open()}
        return [Connection(name, name in self._serving, now - since) for name, since in self._since.items()]

    def _open(self) -> Iterator[tuple[str, socket.socket]]:
        """Each by its name, and as a socket of our own: the number in the list may be another file's by now."""
        for number in os.listdir(_FILES):
            with contextlib.suppress(OSError, IndexError, TypeError):  # no socket, none of TCP, or not connected
                if not stat.S_ISSOCK(os.fstat(int(number)).st_mode):
                    continue
                with socket.socket(fileno=os.dup(int(number))) as connection:
                    if connection.getsockname()[1] == self.port:
                        yield _name(connection.getpeername()), connection


def _name(peer: tuple[str, int]) -> str:
    address = ipaddress.ip_address(peer[0].partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        return f"ipv4:{address.ipv4_mapped}:{peer[1]}" if address.ipv4_mapped else f"ipv6:[{peer[0]}]:{peer[1]}"
    return f"ipv4:{address}:{peer[1]}"
