"""Peer processes and plain transformers for benchmarks, and the way results are printed."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from petal.client.cli.demo import N_BLOCKS, ChildPeer, split
from petal.client.swarm import SwarmModel
from rich.console import Console
from rich.table import Table

from tests.support.reference import demo_checkpoint, demo_reference

PROMPT = "Explain how a bicycle stays upright."
console = Console(stderr=True)


@contextmanager
def process_swarm(
    peers: int, *options: str, link_delay_ms: float | None = None, codec: str = "float32", **environment: str
) -> Iterator[SwarmModel]:
    """A client of `peers` real peer processes, each behind an emulated link where a one-way delay is given."""
    with (
        peer_processes(peers, *options, link_delay_ms=link_delay_ms, **environment) as (address, _),
        SwarmModel.connect("demo", [address], wait_s=30, codec=codec) as model,
    ):
        yield model


@contextmanager
def peer_processes(
    peers: int, *options: str, link_delay_ms: float | None = None, **environment: str
) -> Iterator[tuple[str, list[EmulatedLink]]]:
    """The first peer's address and the links, one in front of each peer where a delay is given."""
    children: list[ChildPeer] = []
    links: list[EmulatedLink] = []
    with tempfile.TemporaryDirectory(prefix="petal-bench-") as folder, contextlib.ExitStack() as stack:
        try:
            for blocks in split(N_BLOCKS, peers):
                extra = ["--quant", "none", *options]  # compared with float32 unless a bench says otherwise
                if link_delay_ms is not None:
                    port = free_port()
                    links.append(stack.enter_context(emulated_link(port, link_delay_ms)))
                    extra += ["--port", str(port), "--announce", links[-1].address]
                initial = [str(children[0].ready["multiaddrs"][0])] if children and children[0].ready else []
                children.append(ChildPeer.start(blocks, Path(folder), initial, *extra, **environment))
                if len(children) == 1:  # the others join through it
                    wait_ready(children[0])
            for child in children:
                wait_ready(child)
            yield children[0].address, links
        finally:
            for child in reversed(children):
                child.stop()
            for child in children:
                child.wait(10)


def wait_ready(child: ChildPeer, timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while child.ready is None:
        child.check()
        assert time.monotonic() < deadline, "a peer did not start"
        child.changed.wait(0.1)
        child.changed.clear()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class EmulatedLink:
    """A proxy process in front of a peer."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input, self._output = process.stdin, process.stdout
        self.address = self._output.readline().split()[-1]

    def order(self, line: str) -> None:
        """One line of the emulator's control protocol."""
        self._input.write(f"{line}\n")
        self._input.flush()

    def bytes(self) -> int:
        """Carried so far, both ways."""
        self.order("bytes")
        return int(self._output.readline())


@contextmanager
def emulated_link(port: int, delay_ms: float, seconds: int = 7200) -> Iterator[EmulatedLink]:
    """A proxy in front of a peer: one-way delay in each direction."""
    command = [sys.executable, "-m", "tests.support.emulator", "--listen", "0", "--to", f"127.0.0.1:{port}"]
    command += ["--delay-ms", str(delay_ms), "--seconds", str(seconds)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield EmulatedLink(process)
    finally:
        process.terminate()
        process.wait()


class Plain:
    """Plain transformers in this process, float32, greedy."""

    def __init__(self) -> None:
        self.model = demo_reference()
        self.ids = demo_checkpoint().tokenizer().apply_chat_template([{"role": "user", "content": PROMPT}])

    @torch.inference_mode()
    def bare_loop(self, tokens: int) -> float:
        """Seconds a token after the first, in a bare cached loop."""
        out = self.model(torch.tensor([self.ids]), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        started = time.perf_counter()
        for _ in range(tokens):
            out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - started) / tokens

    @torch.inference_mode()
    def generate(self, tokens: int) -> float:
        """Seconds a token after the first, in transformers' generate()."""
        stamps: list[float] = []

        class Clock:
            def put(self, _: Any) -> None:
                stamps.append(time.perf_counter())

            def end(self) -> None:
                pass

        self.model.generate(
            torch.tensor([self.ids]), do_sample=False, max_new_tokens=tokens + 1, eos_token_id=None, streamer=Clock()
        )
        return (stamps[-1] - stamps[1]) / tokens


def decode_seconds(model: SwarmModel, tokens: int, **settings: Any) -> tuple[float, float, list]:
    """Seconds a token after the first, seconds to the first, and the pieces."""
    prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": PROMPT}])
    settings = {"drafter": "none", **settings}
    pieces = list(model.stream(prompt, max_new_tokens=tokens + 1, eos_token_id=-1, **settings))
    return sum(piece.seconds for piece in pieces[1:]) / tokens, pieces[0].seconds, pieces


def interleave(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median of each contender over rounds in which all of them ran, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            seconds = run()
            if turn:
                times[name].append(seconds)
        console.print(f"[dim]round {turn} of {rounds}[/dim]")
    return {name: median(values) for name, values in times.items()}


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def report(title: str, rows: list[tuple[str, ...]], columns: tuple[str, ...], figures: dict[str, Any]) -> None:
    """A table for people, then one JSON line for machines."""
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(json.dumps({name: round(v, 3) if isinstance(v, float) else v for name, v in figures.items()}))
