"""The compute thread's own rules, on a tiny model without a network."""

from __future__ import annotations

import threading

import pytest
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


def _wanting() -> Step:
    """Hidden states are asked for, too."""
    return Step(header_of(pb.Step(step=1, prefill=True, want=pb.Want(hidden=True)), 3), (1, 2, 3))


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
    assert str(results[0]) == "compute failed: out of memory"
    assert results[1].verification is not None


def test_results_that_do_not_come_end_the_step_and_not_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a card says it that another program fills: in many lines, of which the client hears the first."""
    engine, results, answered = _engine(), [], threading.Event()

    def full(codec: str, rows: object) -> memoryview:
        monkeypatch.undo()
        raise RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB.")

    def done(result) -> None:
        results.append(result)
        answered.set()

    monkeypatch.setattr(engine.span.backend, "encode", full)
    engine.open(b"t", Tenant("c"), pb.FLOAT32, range(4))
    engine.start()
    try:
        for session in (b"s", b"t"):
            answered.clear()
            engine.submit(session, _wanting(), done)
            assert answered.wait(20)
    finally:
        engine.stop()
    assert str(results[0]) == "compute failed: CUDA out of memory."
    assert results[1].hidden


def test_a_lost_device_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step fails, the thread ends at once, and the engine knows why."""
    engine, results = _engine(), []

    def lost(rows: object, *more: object) -> None:
        raise RuntimeError("CUDA error: device lost")

    monkeypatch.setattr(engine._runner, "run", lost)
    monkeypatch.setattr(engine.span.backend, "failure", lambda: "the device cuda:0 fails: device lost")
    engine.submit(b"s", _step(), results.append)
    engine.start()
    engine.thread.join(20)
    assert not engine.thread.is_alive()
    assert engine.lost == "the device cuda:0 fails: device lost"
    assert str(results[0]) == "compute failed: CUDA error: device lost"
