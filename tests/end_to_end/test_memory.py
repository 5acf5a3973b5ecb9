"""A peer reads and keeps its own blocks only, and little more than their bytes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from petal.client.cli.demo import ChildPeer
from petal.peer.model import load_span
from petal.protocol.checkpoint.open import open_checkpoint

from ..bench.swarm import wait_ready
from ..support.imports import ROOT
from ..support.q4_k_m import CONFIGS, write_q4_k_m

MIB = 1 << 20


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
