"""A slow network on loopback: a TCP proxy with one-way delay, jitter, a bandwidth limit, and faults on demand.

In a test: ``async with Link("127.0.0.1:5000", delay_s=0.025) as link: connect(link.address)``. As a process of its own:
``python -m tests.support.emulator --listen 0 --to 127.0.0.1:5000 --delay-ms 12.5``; it prints its address and obeys the
lines ``cut``, ``stall``, ``resume``, ``reset``, ``delay MS`` and ``mbit MBIT`` on its standard input; ``bytes`` prints
how many it carried so far, both ways. Linux only. Opening a connection costs no round trip, as the kernel accepts it
before the proxy knows.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from typing import Any

from .delay_line import FIN, RST, Conditions, Lane, Pipe, reset


class End(asyncio.Protocol):
    """One of the two sockets of a connection: `inward` takes what it sends, `outward` brings what it receives."""

    def __init__(self, inward: Pipe, outward: Pipe) -> None:
        self._inward = inward
        self._outward = outward

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._inward.source = self._outward.sink = transport
        self._outward.release()

    def data_received(self, data: bytes) -> None:
        self._inward.take(data)

    def eof_received(self) -> bool:
        self._inward.end(FIN)
        return True  # the other direction stays open

    def pause_writing(self) -> None:
        self._outward.block(True)

    def resume_writing(self) -> None:
        self._outward.block(False)

    def connection_lost(self, error: Exception | None) -> None:
        self._inward.source = None
        self._outward.close()
        if not self._inward.finished:
            self._inward.end(RST)


class Link:
    """A proxy in front of `target` (host:port). It ends with its `async with`, or by itself after `lifetime_s`."""

    def __init__(self, target: str, *, port: int = 0, lifetime_s: float = 600.0, **conditions: Any) -> None:
        self.conditions = Conditions(**conditions)
        self.address = ""
        self._target = target.rpartition(":")
        self._port = port
        self._lifetime_s = lifetime_s
        self._lanes = Lane(), Lane()
        self._pipes: list[Pipe] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()

    async def __aenter__(self) -> Link:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, "127.0.0.1", self._port)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        self._end_timer = loop.call_later(self._lifetime_s, self._end)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._end()

    @property
    def bytes(self) -> int:
        """Carried so far, both ways."""
        return sum(lane.bytes for lane in self._lanes)

    async def ended(self) -> None:
        """Wait until the lifetime is over."""
        await self._ended.wait()

    def set(self, **changes: Any) -> None:
        """Change the conditions, for open and new connections; bytes on their way keep their time."""
        self.conditions = replace(self.conditions, **changes)
        for pipe in self._pipes:
            pipe.release()

    def cut(self) -> None:
        """Silently drop everything, both ways. `resume` heals the link, but not the connections that were open."""
        self.set(cut=True)
        for pipe in self._pipes:
            pipe.close()

    def stall(self) -> None:
        """Hold everything back, both ways, until `resume`."""
        self.set(stalled=True)

    def resume(self) -> None:
        """End a stall or a cut."""
        self.set(stalled=False, cut=False)

    def reset(self) -> None:
        """End the open connections with RST, both ways."""
        for pipe in self._pipes:
            pipe.close()
            if pipe.sink is not None:
                reset(pipe.sink)
        self._pipes.clear()

    def _accept(self) -> End:
        up, down = (Pipe(lambda: self.conditions, lane) for lane in self._lanes)
        up.twin, down.twin = down, up
        self._pipes = [pipe for pipe in self._pipes if not pipe.gone] + [up, down]
        task = asyncio.ensure_future(self._connect(up, down))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return End(up, down)

    async def _connect(self, up: Pipe, down: Pipe) -> None:
        if self.conditions.cut:
            up.close()
            return
        host, _, port = self._target
        try:
            connected = await asyncio.get_running_loop().create_connection(lambda: End(down, up), host, int(port))
        except OSError:
            down.end(RST)
            return
        if up.dead:  # the client has gone in the meantime
            reset(connected[0])

    def _end(self) -> None:
        self._end_timer.cancel()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        self.reset()
        self._ended.set()


def obey(link: Link, line: str) -> None:
    """Carry out one line of the control protocol."""
    words = line.split()
    if words in (["cut"], ["stall"], ["resume"], ["reset"]):
        getattr(link, words[0])()
    elif words[:1] == ["delay"] and len(words) == 2:
        link.set(delay_s=float(words[1]) / 1000)
    elif words[:1] == ["mbit"] and len(words) == 2:
        link.set(bits_per_s=float(words[1]) * 1e6)
    elif words == ["bytes"]:
        print(link.bytes, flush=True)
    elif words:
        print(f"Unknown command {line!r}: see the module's description.", file=sys.stderr)


async def main(options: argparse.Namespace) -> None:
    """Run one link until its time is over."""
    loop = asyncio.get_running_loop()
    async with Link(
        options.to,
        port=options.listen,
        lifetime_s=options.seconds,
        delay_s=options.delay_ms / 1000,
        jitter_s=options.jitter_ms / 1000,
        bits_per_s=options.mbit * 1e6,
    ) as link:
        print(link.address, flush=True)

        def read() -> None:
            lines = os.read(sys.stdin.fileno(), 4096).decode().splitlines()
            for line in lines:
                obey(link, line)
            if not lines:
                loop.remove_reader(sys.stdin)

        with suppress(PermissionError):  # a file such as /dev/null has no events
            loop.add_reader(sys.stdin, read)
        await link.ended()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--listen", type=int, default=0, metavar="PORT")
    parser.add_argument("--to", required=True, metavar="HOST:PORT")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="one way")
    parser.add_argument("--jitter-ms", type=float, default=0.0, help="plus or minus")
    parser.add_argument("--mbit", type=float, default=0.0, help="each way; 0: unlimited")
    parser.add_argument("--seconds", type=float, default=600.0, help="ends by itself after this long")
    asyncio.run(main(parser.parse_args()))
