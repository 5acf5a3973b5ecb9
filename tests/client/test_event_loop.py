"""The thread that serves synchronous code: what becomes of it at the end of a program, after `stop`, and in a fork."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator

import pytest
from petal.client.event_loop import EventLoopThread

BEGIN = """
import asyncio, os, sys, threading
from petal.client.event_loop import EventLoopThread
from petal.client.load_once import LoadOnce
loop = EventLoopThread()
closed = []
async def numbers():
    try:
        for number in range(10**6):
            yield number
            await asyncio.sleep(0)
    finally:
        print("closed", flush=True)
"""
STREAM = "stream = loop.iterate(numbers())\nassert next(stream) == 0\n"
SLOW_LOAD = """
async def load():
    LoadOnce().start("slow", lambda: threading.Event().wait(60))
loop.run(load())
"""
FORK = """
child = os.fork()
if child == 0:
    async def nothing(): pass
    try:
        loop.run(nothing())
    except RuntimeError as error:
        print(error, flush=True)
    sys.exit()
os.waitpid(child, 0)
"""


def script(text: str) -> tuple[int, str, str, float]:
    """Exit code, what was printed and said of errors, and seconds from its last line to its end."""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", BEGIN + text], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def test_a_script_ends_though_a_stream_is_open() -> None:
    code, out, errors, _ = script(STREAM)
    assert (code, out, errors) == (0, "closed\n", "")


def test_a_script_ends_after_an_exception_of_its_own() -> None:
    code, out, errors, _ = script(STREAM + "raise KeyError('mine')")
    assert (code, out) == (1, "closed\n")
    assert errors.strip().endswith("KeyError: 'mine'")


def test_a_stream_left_when_the_model_is_closed_is_silent() -> None:
    code, out, errors, _ = script(STREAM + "loop.stop()\nloop.stop()\ndel stream\n")
    assert (code, out, errors) == (0, "closed\n", "")


def test_nobody_waits_for_a_load_that_is_not_needed() -> None:
    code, _, errors, seconds = script(SLOW_LOAD)
    assert (code, errors) == (0, "")
    assert seconds < 20


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="there is no fork here")
def test_a_fork_says_that_it_has_no_model() -> None:
    code, out, _, _ = script(FORK)
    assert code == 0
    assert out.startswith("a process made by fork cannot use its parent's model")


def test_a_closed_model_says_so() -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1
        yield 2

    loop = EventLoopThread()
    stream = loop.iterate(numbers())
    assert next(stream) == 1
    loop.stop()
    with pytest.raises(RuntimeError, match="the model is closed"):
        next(stream)
