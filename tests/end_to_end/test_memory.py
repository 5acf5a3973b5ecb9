"""A peer reads and keeps its own blocks only, and little more than their bytes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from petal.client.cli import demo
from petal.client.cli.demo import ChildPeer
from petal.client.swarm import SwarmModel
from petal.kernels.registry import backend_for
from petal.peer.joining import Joiner
from petal.peer.model import load_span
from petal.peer.options import ServeOptions
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.memory import available_bytes

from ..bench.swarm import wait_ready
from ..support.imports import ROOT
from ..support.q4_k_m import CONFIGS, write_q4_k_m
from ..support.swarms import local_swarm
from ..support.tiny import tiny_llama

MIB, GIB = 1 << 20, 1 << 30


def peak_mb(blocks: range, folder: Path) -> float:
    """Most resident memory of a real `petal-serve` process from its start until it serves."""
    child = ChildPeer.start(blocks, folder, [], "--cache-tokens", "1024", "--quant", "none")
    try:
        wait_ready(child)
        status = Path(f"/proc/{child.process.pid}/status").read_text()
    finally:
        child.stop()
        child.wait(10)
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def test_only_a_spans_own_tensors_are_read_and_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick twin of the test below, by names and bytes."""
    names: set[str] = set()
    with open_checkpoint("demo") as checkpoint:
        for way in ("read", "raw", "packed"):
            found = getattr(type(checkpoint), way)
            monkeypatch.setattr(
                type(checkpoint), way, lambda self, name, found=found: (names.add(name), found(self, name))[1]
            )
        span = load_span(checkpoint, 10, 12)
        own = {name: checkpoint.tensors[name] for block in (10, 11) for name in checkpoint.block_tensors(block)}
    assert names == own.keys()
    assert span.nbytes == pytest.approx(4 * sum(math.prod(info.shape) for info in own.values()), rel=0.02)


@pytest.mark.full
def test_a_third_of_the_blocks_needs_much_less_memory_than_all(tmp_path: Path) -> None:
    whole = peak_mb(range(0, 30), tmp_path)
    third = peak_mb(range(10, 20), tmp_path)
    # 30 blocks are 425 MB in float32, embedding and head 113 MB each.
    print(f"\npeak memory: blocks 10:20 {third:.0f} MB, blocks 0:30 {whole:.0f} MB")
    assert whole - third > 0.9 * (425 * 2 / 3 + 2 * 113)


async def test_a_cache_of_any_size_is_announced() -> None:
    """Whole pages are counted on both sides of the record: else the swarm would never hear of the peer."""
    async with local_swarm(tiny_llama(), [range(4)], cache_tokens=1003) as swarm:
        record = swarm.peers[0].record()
        assert 1003 <= record.cache_tokens == record.cache_tokens_free <= 1003 + 15
        async with swarm.connect() as client:
            assert len(await client.generate([5, 17], max_new_tokens=4, eos_token_id=-1)) == 6


def test_a_joiner_keeps_within_a_containers_memory(tmp_path: Path) -> None:
    """The quick twin of the test below: a container of a gigabyte on a machine of a terabyte."""
    container = {"memory.max": GIB, "memory.current": 400 * MIB, "memory.stat": "inactive_file 0"}
    system = {"proc/self/cgroup": "0::/", "proc/meminfo": f"MemAvailable: {GIB} kB"}
    for name, text in {**system, **{f"sys/fs/cgroup/{key}": value for key, value in container.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    taken = {}
    with open_checkpoint("demo") as checkpoint:
        for quant in ("none", None):
            options = ServeOptions(model="demo", quant=quant)
            backend = backend_for()
            free = int(available_bytes(tmp_path) * backend.weights_share)
            joiner = Joiner(options, checkpoint, backend, free, lambda text: None)
            taken[quant] = len(joiner.blocks(joiner.precision([]), []))
    assert 5 < taken["none"] < 20
    assert taken[None] == 30 or not backend_for().native, "as they are stored all fit"


def limited(nbytes: int) -> Path:
    """A control group with so much memory. Raises OSError where this system or user has none to give."""
    for mount, limit in (("memory", "memory.limit_in_bytes"), ("", "memory.max")):
        group = Path("/sys/fs/cgroup") / mount / f"petal-test-{os.getpid()}"
        try:
            group.mkdir()
            (group / limit).write_text(str(nbytes))
            return group
        except OSError:
            with suppress(OSError):
                group.rmdir()
    raise OSError("no control group of memory can be made here")


@pytest.fixture
def group() -> Iterator[Path]:
    try:
        made = limited(GIB)
    except OSError as error:
        pytest.skip(str(error))
    yield made
    for _ in range(50):
        with suppress(OSError):
            made.rmdir()
            return
        time.sleep(0.1)
    raise AssertionError("something still runs in the group")


@pytest.mark.full
@pytest.mark.parametrize("quant", ["none", ""])
def test_a_gigabyte_is_kept_to(quant: str, group: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a real control group of that size: the peer serves what fits, and lives through a long prompt."""
    options = f"--host 127.0.0.1 --json --identity {tmp_path}/inside" + (f" --quant {quant}" if quant else "")
    program = tmp_path / "petal-serve"
    program.write_text(f"#!/bin/sh\necho $$ > {group}/cgroup.procs\nexec {demo.peer_program()} demo {options}\n")
    program.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr(demo, "peer_program", lambda: str(program))
        peers = [ChildPeer.start(range(0, 30), tmp_path, [])]
    try:
        wait_ready(peers[0])
        assert peers[0].ready is not None
        start, end = peers[0].ready["blocks"]
        assert (start, end) == (0, 30) if not quant else 10 <= end < 30
        if end < 30:
            peers.append(ChildPeer.start(range(end, 30), tmp_path, [peers[0].address], "--quant", quant))
            wait_ready(peers[1])
        with SwarmModel.connect("demo", initial_peers=[peers[0].address], wait_s=30) as model:
            said = model.generate(list(range(100, 2100)), max_new_tokens=16, eos_token_id=-1)
        assert len(said) == 2016
        assert peers[0].process.poll() is None
        print(f"\nblocks {start}:{end} of 30 in a gigabyte")
    finally:
        for peer in reversed(peers):
            peer.stop()
            peer.wait(10)


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
@pytest.mark.parametrize("model", CONFIGS)
def test_a_q4_k_m_file_takes_little_more_than_itself(model: str, tmp_path: Path) -> None:
    """Files of real shapes and types; the quick twins, by names and sizes, are in `peer/test_stored.py`."""
    kinds = write_q4_k_m(tmp_path / f"{model}.gguf", model)
    assert {"q4_k", "q5_0", "q6_k", "q8_0"} == kinds.keys()
    command = [sys.executable, "-m", "tests.support.load_memory", str(tmp_path / f"{model}.gguf")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    taken = json.loads(done.stdout)
    file, held, peak = taken["file"], taken["held"], taken["peak"]
    print(f"\n{model}: a file of {file / MIB:.0f} MiB, {held / file:.2f} x held, {peak / file:.2f} x at most")
    assert taken["counted"] <= held <= 1.15 * file
    # The names of its tokens, which are read before, are the rest.
    assert peak <= 1.5 * file + 64 * MIB
