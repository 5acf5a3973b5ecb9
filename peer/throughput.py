"""What this machine can do for a model: memory for its weights, rows a second through a span."""

from __future__ import annotations

import time

import torch

from ..kernels.backend import Backend
from ..protocol.memory import available_bytes
from ..protocol.wire.tree import chain
from .engine.kv_cache import KVCache
from .engine.runner import ModelRunner, Segment
from .model import Span


def free_bytes(backend: Backend) -> int:
    """Memory that weights may take."""
    return int(backend.free_bytes(available_bytes()) * backend.weights_share)


def decode_tokens_per_s(span: Span, rounds: int = 5) -> float:
    """One row at a time through the whole span: median of a few rounds."""
    backend = span.backend
    cache = KVCache(backend, span.layers, 64)
    runner, table = ModelRunner(span, cache), cache.open()
    row = torch.zeros(1, span.hidden_size, device=backend.device, dtype=backend.stream)
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        runner.run([Segment(table, row, chain(1), range(span.start, span.end))])[0].cpu()
        times.append(time.perf_counter() - started)
        cache.commit(table, [0])
    return 1 / sorted(times[1:])[rounds // 2]
