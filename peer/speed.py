"""What this machine can do for a model: blocks that fit its memory, rows a second through a span."""

from __future__ import annotations

import math
import os
import time

import torch

from ..protocol.checkpoint import Checkpoint
from ..protocol.tree import chain, depths
from .executor import Executor, Segment
from .pool import KVPool
from .span import Span

# The rest is left to the cache, the activations and the person at the machine.
MEMORY_SHARE = 0.6


def fitting_blocks(checkpoint: Checkpoint, value_bytes: int) -> int:
    """Blocks whose weights, of so many bytes a value, fit the free memory beside embedding and head."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * MEMORY_SHARE
    shared = sum(_values(checkpoint, names) for names in checkpoint.shared_tensors().values())
    block = max(_values(checkpoint, checkpoint.block_tensors(b)) for b in range(checkpoint.n_blocks))
    return min(checkpoint.n_blocks, int((free / value_bytes - shared) // block))


def _values(checkpoint: Checkpoint, names: list[str]) -> int:
    return sum(math.prod(checkpoint.info(name).shape) for name in names)


def decode_rows_per_s(span: Span, rounds: int = 5) -> float:
    """One row at a time through the whole span: median of a few rounds."""
    pool = KVPool(span.layers, 64)
    executor = Executor(span, pool)
    cache = pool.open()
    row = torch.zeros(1, span.hidden_size)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        executor.run([Segment(cache, row, chain(1), depths(chain(1)), range(span.start, span.end))])
        times.append(time.perf_counter() - started)
        pool.commit(cache, [0])
    return 1 / sorted(times[1:])[rounds // 2]
