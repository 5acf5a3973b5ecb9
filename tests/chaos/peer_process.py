"""A peer in a process of its own, run by `petal-serve`'s own code, that also tells what it holds.

Processes are forked from a server that has imported everything: starting one takes a second, not ten.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

PUBLISH_S = 1.0
START_S = 60.0
_context = get_context("forkserver")
_context.set_forkserver_preload(["tests.chaos.peer_process", "petal.peer.server", "petal.peer.cli"])


@dataclass(frozen=True)
class Holdings:
    """What a peer holds of its clients."""

    sessions: int
    pages: int
    replay_bytes: int

    @property
    def nothing(self) -> bool:
        return self == Holdings(0, 0, 0)


def free_port() -> int:
    """A port that no outgoing connection is given: a peer that restarts finds it free again."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class PeerProcess:
    """One peer, whatever happens to its process: same blocks, same identity, same ports."""

    def __init__(
        self, model: str, blocks: range, folder: Path, number: int, files: int | None = None, **changed: Any
    ) -> None:
        """`files`: how many it may open; `changed`: fields of its ServeOptions."""
        self.blocks = blocks
        self.port, self.dht_port = free_port(), free_port()
        self.announced = f"127.0.0.1:{self.port}"
        self.peer_id = self.multiaddr = ""
        self._model = model
        self._files, self._changed = files, changed
        self._folder = folder
        self._name = f"peer-{number}"
        self._log = folder / f"peer-{number}.log"
        self._process: Any = None
        self._pipe: Connection | None = None
        self._family: list[psutil.Process] = []

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.is_alive()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exitcode(self) -> int | None:
        return None if self._process is None else self._process.exitcode

    async def start(self, initial_peers: Sequence[str]) -> None:
        """Returns once it serves."""
        options = ["--blocks", f"{self.blocks.start}:{self.blocks.stop}", "--host", "127.0.0.1", "--exact", "--json"]
        options += ["--port", str(self.port), "--dht-port", str(self.dht_port), "--announce", self.announced]
        options += ["--identity", str(self._folder / self._name), "--cache-tokens", "8192", "--threads", "1"]
        options += ["--grace", "20", "--quant", "none"]  # as the peer that gave the undisturbed answers
        for peer in initial_peers:
            options += ["--initial-peers", peer]
        self._pipe, theirs = _context.Pipe()
        served = ([self._model, *options], theirs, str(self._log), self._files, self._changed)
        self._process = _context.Process(target=_serve, args=served, daemon=True)
        self._process.start()
        theirs.close()
        self.peer_id, self.multiaddr = await self._receive(START_S)
        self._family = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children(recursive=True)]

    async def holdings(self) -> Holdings:
        assert self._pipe is not None
        self._pipe.send("holdings")
        return await self._receive(10.0)

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    async def ended(self, timeout: float) -> bool:
        """Whether the process, and those that it started, are gone within this time."""
        deadline = time.monotonic() + timeout
        while self.alive or any(_running(process) for process in self._family):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def destroy(self) -> None:
        if self.alive:
            self.signal(signal.SIGKILL)
        for process in filter(_running, self._family):
            process.kill()

    async def _receive(self, timeout: float) -> Any:
        assert self._pipe is not None
        if not await asyncio.to_thread(self._pipe.poll, timeout):
            raise TimeoutError(f"{self._name} of blocks {self.blocks} says nothing")
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self._name} ended: {self._log.read_text()[-1000:]}") from None


def _running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _serve(arguments: list[str], pipe: Connection, log: str, files: int | None, changed: dict[str, Any]) -> None:
    """In the new process."""
    if files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    from petal.peer import cli, server

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)

    class Observed(server.PeerServer):
        """Publishes quickly, and tells through the pipe what it holds."""

        def __init__(self, options: Any, progress: Any = None) -> None:
            super().__init__(replace(options, publish_s=PUBLISH_S, **changed), progress)

        async def start(self) -> None:
            await super().start()
            asyncio.get_running_loop().add_reader(pipe.fileno(), self._tell)
            pipe.send((self.identity.peer_id, self.announcement.bootstrap[0]))

        def _tell(self) -> None:
            try:
                pipe.recv()
            except EOFError:
                os._exit(1)  # whoever runs the trials is gone
            self.engine.call(self._tell_holdings)

        def _tell_holdings(self) -> None:
            self.engine.check()
            cache = self.engine.cache
            sessions, replay = self.admission.sessions, self.service.sessions.replay_budget.used
            pipe.send(Holdings(sessions, cache.n_pages - cache.free_pages, replay))

    server.PeerServer = Observed  # type: ignore[misc]
    cli.app(arguments)
