"""A peer whose compute hangs or died says so and ends, though its event loop lives; and a peer always ends."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable

import grpc
import pytest
from petal.kernels.slow_work import slow_work
from petal.peer import server
from petal.peer.engine import watchdog
from petal.peer.engine.watchdog import Watchdog

from ..support.swarms import local_swarm
from ..support.tiny import tiny_llama
from ..support.wire import Wire

Code = grpc.StatusCode


class Asked:
    """A thread that is asked, and its watchdog, with a clock of the test's."""

    def __init__(self) -> None:
        self.commands: list[Callable[[], None]] = []
        self.dog = Watchdog(threading.main_thread(), self.commands.append, 10.0, lambda reason: None)

    def work(self) -> None:
        while self.commands:
            self.commands.pop()()


def test_a_thread_that_answers_is_well() -> None:
    asked = Asked()
    for now in (0.0, 9.0, 18.0, 1000.0):
        assert not asked.dog.check(now)
        asked.work()


def test_a_thread_that_does_not_come_back_hangs() -> None:
    asked = Asked()
    assert [asked.dog.check(now) for now in (100.0, 105.0, 110.0)] == ["", "", ""]
    assert asked.dog.check(111.0) == "its compute has hung for 11 s"


def test_slow_work_that_says_so_has_a_limit_of_its_own() -> None:
    asked = Asked()
    with slow_work(60.0):
        assert [asked.dog.check(now) for now in (0.0, 100.0)] == ["", ""]
    assert not asked.dog.check(109.0)
    with slow_work(0.0):
        assert asked.dog.check(111.0), "it is past its own limit"


def die(gate: threading.Event) -> None:
    raise AssertionError("a fault of our own, outside of what is guarded")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize(
    ("command", "reason"), [(die, "thread died"), (lambda gate: gate.wait(30) and None, "has hung for")]
)
async def test_a_peer_whose_compute_fell_ends_its_service_and_its_record(
    monkeypatch: pytest.MonkeyPatch, command: Callable[[threading.Event], None], reason: str
) -> None:
    monkeypatch.setattr(watchdog, "CHECK_S", 0.05)
    monkeypatch.setattr(server, "stall_s", lambda rows_per_s: 0.5)
    gate = threading.Event()
    async with local_swarm(tiny_llama(), [range(0, 4)] * 2) as swarm, Wire(swarm.peers[1]) as wire:
        broken, other = swarm.peers[1], swarm.peers[0]
        session, _ = await wire.session()
        broken.engine.call(lambda: command(gate))
        assert reason in await asyncio.wait_for(asyncio.shield(broken.fallen), 20)
        await session.refused(Code.UNAVAILABLE, "this peer is shutting down")
        await broken.stop()
        assert broken.identity.peer_id not in [record.peer_id for record in await other.directory.list()]
        gate.set()
        swarm.peers.remove(broken)


HANGING = """
import asyncio, os, signal, sys
from petal.peer import lifecycle
from petal.peer.options import ServeOptions

class Hanging:
    class service: sessions = ()
    class announcement: expelled = asyncio.Event()
    def __init__(self, *_):
        self.fallen = asyncio.get_running_loop().create_future()
    async def start(self): pass
    async def drain(self, grace_s):
        print("draining", flush=True)
        await asyncio.sleep(1000)
    async def stop(self): await asyncio.sleep(1000)

class Quiet(lifecycle.JsonLines):
    def ready(self, server): print("ready", flush=True)

lifecycle.PeerServer, lifecycle.JsonLines, lifecycle.HURRY_S = Hanging, Quiet, 0.2
lifecycle.run_peer(ServeOptions("model"), True)
"""


def test_a_second_signal_always_ends_a_peer() -> None:
    with subprocess.Popen([sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True) as peer:
        assert peer.stdout
        for word in ("ready", "draining"):
            while word not in peer.stdout.readline():
                assert peer.poll() is None
            peer.send_signal(signal.SIGTERM)
        assert peer.wait(30) == 128 + signal.SIGTERM
