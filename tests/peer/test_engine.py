"""The compute thread's own rules, on a tiny model without a network."""

from __future__ import annotations

import threading

from petal.peer.engine.engine import Engine
from petal.peer.engine.fair_queue import Tenant
from petal.peer.engine.kv_cache import KVCache
from petal.peer.engine.step import Step
from petal.peer.model import load_span
from petal.protocol import petal_pb2 as pb
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.wire.step import header_of

from ..support.tiny import tiny_llama


def _step() -> Step:
    return Step(header_of(pb.Step(step=1, prefill=True, sample=True), 3), (1, 2, 3))


def _engine() -> Engine:
    span = load_span(open_checkpoint(tiny_llama()), 0, 4)
    engine = Engine(span, KVCache(span.backend, span.layers, 256))
    engine.open(b"s", Tenant("c"), pb.FLOAT32, range(4))
    return engine


def test_a_flood_of_commands_does_not_starve_a_ready_step() -> None:
    engine, answered = _engine(), threading.Event()
    flooding = True

    def flood() -> None:
        if flooding:
            engine.call(flood)

    engine.call(flood)
    engine.submit(b"s", _step(), lambda result: answered.set())
    engine.start()
    try:
        assert answered.wait(20), "the step never ran"
    finally:
        flooding = False
        engine.stop()


def test_a_failing_lm_head_ends_the_step_and_not_the_thread() -> None:
    engine, results, answered = _engine(), [], threading.Event()
    whole = engine.span.logits

    def broken(hidden):
        engine.span.logits = whole
        raise RuntimeError("out of memory")

    def done(result) -> None:
        results.append(result)
        answered.set()

    engine.span.logits = broken
    engine.open(b"t", Tenant("c"), pb.FLOAT32, range(4))
    engine.start()
    try:
        for session in (b"s", b"t"):
            answered.clear()
            engine.submit(session, _step(), done)
            assert answered.wait(20)
    finally:
        engine.stop()
    assert "out of memory" in str(results[0])
    assert results[1].verification is not None
