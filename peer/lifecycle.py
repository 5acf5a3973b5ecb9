"""One peer from its start to its exit: signals, and what is said meanwhile."""

from __future__ import annotations

import os

# Idle OpenMP threads spin, and three peers on one machine starve each other. Read when torch loads its OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# The DHT daemon is started by fork and exec, which needs nothing of gRPC; its handlers would only warn.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

import asyncio
import signal
import sys

import uvloop

from ..protocol.program import sentence
from .options import ServeOptions
from .server import PeerServer
from .terminal import JsonLines, Terminal

# A closed terminal ends a peer as its owner's Ctrl-C does.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_peer(options: ServeOptions, json_lines: bool) -> int:
    """The exit code. Raises CheckpointError, DirectoryError, ServeError, OSError, ValueError."""
    ui = JsonLines() if json_lines else Terminal()
    ui.set_up_logging()
    # The loop and the compute thread hand work to each other: neither should sit on the interpreter for long.
    sys.setswitchinterval(5e-4)
    try:
        return uvloop.run(_Lifecycle(options, ui).run())
    except Exception as error:
        ui.failed(sentence(error))
        raise


class Expelled(RuntimeError):
    """A revoked peer ends, with an exit code of its own: starting it again would not help."""

    exit_code = 3

    def __init__(self) -> None:
        super().__init__(
            "this peer's membership of its swarm was revoked or has run out; ask an admin for a new invitation, and "
            "start with another --identity"
        )


class _Lifecycle:
    """Starts, serves until a signal comes, drains; a second signal cuts that short."""

    def __init__(self, options: ServeOptions, ui: Terminal | JsonLines) -> None:
        self._options = options
        self._ui = ui
        self._signal = 0
        self._leaving, self._hurrying = asyncio.Event(), asyncio.Event()

    async def run(self) -> int:
        for number in _ENDING:
            asyncio.get_running_loop().add_signal_handler(number, self._end, number)
        server = PeerServer(self._options, self._ui.progress())
        starting = asyncio.create_task(server.start())
        leaving = asyncio.create_task(self._leaving.wait())
        await asyncio.wait([starting, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait([starting])
            self._ui.stop()
            # A thread that loads weights would be waited for.
            os._exit(128 + self._signal)
        starting.result()
        self._ui.ready(server)
        expelled = asyncio.create_task(server.announcement.expelled.wait())
        await asyncio.wait([leaving, expelled], return_when=asyncio.FIRST_COMPLETED)
        if expelled.done():
            await server.stop()
            raise Expelled
        self._ui.leaving(len(server.service.sessions))
        draining = asyncio.create_task(server.drain(self._options.grace_s))
        hurrying = asyncio.create_task(self._hurrying.wait())
        await asyncio.wait([draining, hurrying], return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        await server.stop()
        return 0

    def _end(self, number: int) -> None:
        self._signal = number
        (self._hurrying if self._leaving.is_set() else self._leaving).set()
