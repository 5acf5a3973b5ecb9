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
import threading
from typing import Any, NoReturn

import uvloop

from ..protocol.program import sentence
from .options import ServeOptions
from .server import PeerServer
from .terminal import JsonLines, Terminal

# A closed terminal ends a peer as its owner's Ctrl-C does.
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# Once somebody has said so twice, or compute has failed: for a farewell to the swarm.
HURRY_S = 10.0
# The exit code of a peer whose compute died or hung: whoever watches it may start it again.
FALLEN = 70


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
        ends: list[asyncio.Future[Any]] = [leaving, expelled, server.fallen]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if server.fallen.done():
            await self._fall(server)
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
        if self._leaving.is_set():
            self._exit_after(HURRY_S, 128 + number)
        (self._hurrying if self._leaving.is_set() else self._leaving).set()

    async def _fall(self, server: PeerServer) -> NoReturn:
        """Compute failed: the swarm hears of it, and the process ends."""
        self._ui.failed(f"this peer ends: {server.fallen.result()}")
        self._exit_after(HURRY_S, FALLEN)
        await server.stop()
        # A thread that hangs would be waited for.
        os._exit(FALLEN)

    def _exit_after(self, seconds: float, code: int) -> None:
        """Whatever hangs, the process ends."""
        timer = threading.Timer(seconds, os._exit, [code])
        timer.daemon = True
        timer.start()
