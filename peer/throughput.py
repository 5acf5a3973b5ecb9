"""What this machine can do for a model: memory for its weights, rows a second through a span."""

from __future__ import annotations

import time

import torch

from ..protocol.memory import available_bytes
from ..protocol.wire.tree import chain
from .engine.kv_cache import KVPool
from .engine.runner import Executor, Segment
from .model import Span

# The rest is left to the cache, the activations and the person at the machine.
MEMORY_SHARE = 0.6


def free_bytes() -> int:
    """Memory that weights may take."""
    return int(available_bytes() * MEMORY_SHARE)


def decode_tokens_per_s(span: Span, rounds: int = 5) -> float:
    """One row at a time through the whole span: median of a few rounds."""
    pool = KVPool(span.layers, 64)
    executor = Executor(span, pool)
    cache = pool.open()
    row = torch.zeros(1, span.hidden_size)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        executor.run([Segment(cache, row, chain(1), range(span.start, span.end))])
        times.append(time.perf_counter() - started)
        pool.commit(cache, [0])
    return 1 / sorted(times[1:])[rounds // 2]
