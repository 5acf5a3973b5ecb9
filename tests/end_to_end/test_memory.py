"""A peer reads and keeps its own blocks only."""

from __future__ import annotations

from pathlib import Path

from petal.client.cli.demo import ChildPeer

from ..bench.swarm import wait_ready


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


def test_a_third_of_the_blocks_needs_much_less_memory_than_all(tmp_path: Path) -> None:
    whole = peak_mb(range(0, 30), tmp_path)
    third = peak_mb(range(10, 20), tmp_path)
    # 30 blocks are 425 MB in float32, embedding and head 113 MB each.
    print(f"\npeak memory: blocks 10:20 {third:.0f} MB, blocks 0:30 {whole:.0f} MB")
    assert whole - third > 0.9 * (425 * 2 / 3 + 2 * 113)
