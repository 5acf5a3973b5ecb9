"""`petal demo`: three peer processes on this machine that find each other and answer a prompt."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...protocol.private import ENVIRONMENT
from ..routing.peers import ConnectError
from ..swarm import SwarmModel
from .conversation import Conversation, reader
from .gateway import curl_line, need_packages, run_until_stopped
from .report import plain_report
from .terminal import peer_program, show

MODEL = "demo"
# Of the variables that `petal-serve` reads.
PREFIX = "PETAL_SERVE_"
N_BLOCKS = 30
LOOPBACK = "127.0.0.1"
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0
NEXT = """
What to try next, here (after [cyan]source .venv/bin/activate[/cyan], where make set Petal up):
  [cyan]petal demo --chat[/cyan]          talk with it
  [cyan]petal demo --serve[/cyan]         keep its URL up, for editors, agents and libraries
  [cyan]petal-serve demo[/cyan]           start a peer that stays; it prints the line for the next machine\
"""


@dataclass
class ChildPeer:
    """A `petal-serve --json` process; `events` hears its lines, `ready` and `error` are the ones that matter."""

    blocks: range
    process: subprocess.Popen[str]
    ready: dict[str, Any] | None = None
    error: str | None = None
    loaded: float = 0.0
    changed: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def start(
        cls, blocks: range, folder: Path, initial_peers: Sequence[str], *options: str, **environment: str
    ) -> ChildPeer:
        """`options` go to `petal-serve` as they are; a later one overrides an earlier."""
        program = peer_program()
        if program is None:
            raise ConnectError("the demo runs peers, which need more packages: pip install 'petal-swarm[peer]'")
        command = [program, MODEL, "--blocks", f"{blocks.start}:{blocks.stop}", "--host", "127.0.0.1", "--json"]
        command += ["--identity", str(folder / f"identity-{blocks.start}"), "--cache-tokens", "8192"]
        for peer in initial_peers:
            command += ["--initial-peers", peer]
        # A process group of its own: Ctrl-C reaches this program alone, which then stops its peers in order.
        process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**_own_environment(), **environment},
        )
        child = cls(blocks, process)
        threading.Thread(target=child._listen, daemon=True).start()
        return child

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                if line.startswith("{"):
                    self._take(json.loads(line))
        self.changed.set()

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == "ready":
            self.ready, self.loaded = event, 1.0
        elif event["event"] == "loading":
            self.loaded = event["done"] / max(1, event["total"])
        elif event["event"] == "error":
            self.error = event["message"]
        self.changed.set()

    @property
    def address(self) -> str:
        assert self.ready is not None
        return str(self.ready["address"])

    def check(self) -> None:
        """Raises ConnectError when the process has ended."""
        if self.process.poll() is not None:
            reason = self.error or f"it ended with code {self.process.returncode}"
            raise ConnectError(f"the peer of blocks {self.blocks.start}:{self.blocks.stop} is gone: {reason}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float) -> None:
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _own_environment() -> dict[str, str]:
    """This program's, without what would lead its peers into another swarm."""
    ours = (ENVIRONMENT, "PETAL_INITIAL_PEERS")
    return {name: value for name, value in os.environ.items() if name not in ours and not name.startswith(PREFIX)}


def split(n_blocks: int, peers: int) -> list[range]:
    """Spans of nearly equal size."""
    bounds = [round(i * n_blocks / peers) for i in range(peers + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


@contextmanager
def local_swarm(peers: int, console: Console, n_blocks: int = N_BLOCKS) -> Iterator[list[ChildPeer]]:
    """Peers that cover the demo model; stops everything it started, whatever happens."""
    children: list[ChildPeer] = []
    with tempfile.TemporaryDirectory(prefix="petal-demo-") as folder:
        try:
            with _bars(console) as bars:
                for blocks in split(n_blocks, peers):
                    # All join through the first, which must answer before they ask.
                    initial = [_first_address(children[0], bars)] if children else []
                    children.append(ChildPeer.start(blocks, Path(folder), initial))
                    bars.add(children[-1])
                bars.wait(children)
            yield children
        finally:
            for child in children:
                child.stop()
            deadline = time.monotonic() + STOP_TIMEOUT_S
            for child in children:
                child.wait(max(0.1, deadline - time.monotonic()))


class _Bars:
    """A progress bar a peer."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: list[tuple[ChildPeer, Any]] = []

    def add(self, child: ChildPeer) -> None:
        name = f"peer {len(self._tasks) + 1}  blocks {child.blocks.start}:{child.blocks.stop}"
        self._tasks.append((child, self._progress.add_task(name, total=1.0)))

    def refresh(self) -> None:
        for child, task in self._tasks:
            child.check()
            self._progress.update(task, completed=child.loaded)

    def wait(self, children: Sequence[ChildPeer]) -> None:
        """Until all are ready. Raises ConnectError when one ends or time is up."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while not all(child.ready for child in children):
            self.refresh()
            if time.monotonic() > deadline:
                raise ConnectError(f"the peers were not ready within {START_TIMEOUT_S:.0f} s")
            children[-1].changed.wait(0.1)
            children[-1].changed.clear()
        self.refresh()


@contextmanager
def _bars(console: Console) -> Iterator[_Bars]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield _Bars(progress)


def _first_address(child: ChildPeer, bars: _Bars) -> str:
    bars.wait([child])
    assert child.ready is not None
    return str(child.ready["multiaddrs"][0])


def run_demo(prompt: str, peers: int, settings: dict[str, Any], chatting: bool, console: Console) -> None:
    """Start the peers, say who hosts what, answer or chat, stop everything. Raises ConnectError."""
    console.print(f"Starting {peers} peers that share SmolLM2-135M-Instruct …")
    with (
        local_swarm(peers, console) as children,
        _watched(children),
        SwarmModel.connect(MODEL, [children[0].address], wait_s=30) as swarm,
    ):
        console.print(_hosts(children))
        if chatting:
            Conversation(swarm, settings, None, verbose=False).run(reader())
            return
        console.print(f"[b cyan]you>[/b cyan] {prompt}", highlight=False)
        chunks = show(swarm.chat().send(prompt, trace=True, **settings))
        console.print(plain_report(chunks, len(children)), highlight=False)
        asyncio.run(_ask_over_http(children[0].address, console))
    console.print(NEXT, highlight=False)


def serve_demo(peers: int, port: int, console: Console) -> None:
    """Start the peers and a gateway to them, and keep both up until Ctrl-C. Raises ConnectError, GatewayError."""
    need_packages()
    from ..gateway.program import GatewayServer, served_model

    async def announced(server: GatewayServer, url: str) -> None:
        print(url, flush=True)
        console.print(f"Three APIs at {url}, until Ctrl-C. Try:", highlight=False)
        console.print(curl_line(url, MODEL), highlight=False, soft_wrap=True, markup=False)

    console.print(f"Starting {peers} peers that share SmolLM2-135M-Instruct …")
    with local_swarm(peers, console) as children, _watched(children):
        console.print(_hosts(children))
        address = children[0].address
        asyncio.run(
            run_until_stopped(lambda: GatewayServer([served_model(MODEL, [address])]), LOOPBACK, port, announced)
        )


async def _ask_over_http(address: str, console: Console) -> None:
    """Once more through a gateway, as any program would ask; nothing where its packages are missing."""
    try:
        need_packages()
    except ValueError:
        return
    from ..gateway.program import GatewayServer, served_model

    server = GatewayServer([served_model(MODEL, [address])])
    running = asyncio.ensure_future(server.run(LOOPBACK, 0))
    try:
        url = await server.started()
        console.print("\nThe same over HTTP, as OpenAI's clients ask:", highlight=False)
        console.print(curl_line(url, MODEL), style="cyan", highlight=False, soft_wrap=True, markup=False)
        print(await asyncio.to_thread(_said_by, url), flush=True)
    finally:
        server.stop()
        await running


def _said_by(url: str) -> str:
    """What the curl line's request is answered."""
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}]}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    # This machine's own, whatever proxy the environment names.
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


@contextmanager
def _watched(children: Sequence[ChildPeer]) -> Iterator[None]:
    """Turns the error that follows from a dead peer into one that names the peer."""
    try:
        yield
    except Exception:
        time.sleep(0.2)
        for child in children:
            child.check()
        raise


def _hosts(children: Sequence[ChildPeer]) -> Table:
    table = Table()
    for name in ("peer", "blocks", "address", "tokens/s alone"):
        table.add_column(name)
    for child in children:
        assert child.ready is not None
        start, end = child.ready["blocks"]
        ready = child.ready
        table.add_row(ready["peer_id"][-8:], f"{start}:{end}", ready["address"], f"{ready['tokens_per_s']:.0f}")
    return table
