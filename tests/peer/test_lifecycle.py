"""`petal-serve` in its first seconds: help and wrong options answer at once, an interrupt ends it without a word."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ..support.tiny import tiny_llama

PROGRAM = [sys.executable, "-m", "petal.peer"]


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["demo", "--nonsense"], 2), (["--version"], 0)])
def test_what_needs_no_model_is_answered_at_once(arguments: list[str], code: int) -> None:
    before = cpu_s()
    done = subprocess.run([*PROGRAM, *arguments], capture_output=True, timeout=60, check=False)
    assert done.returncode == code
    assert cpu_s() - before < 1.0, "0.35 s alone; torch by itself takes more than one"


def test_a_command_line_is_checked_without_torch() -> None:
    check = "import sys, petal.peer.cli; print(*{'torch', 'hivemind', 'transformers', 'uvloop'} & set(sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout.split() == []
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.full)])
def test_an_interrupt_while_it_starts_says_nothing_and_leaves_nothing(number: int, tmp_path: Path) -> None:
    points = (0.15, 0.4, 1.0, 2.0)  # in seconds of its own computing, since machines are busy
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [*PROGRAM, str(tiny_llama()), "--host", "127.0.0.1", "--identity"]
    started = {
        point: subprocess.Popen([*command, tmp_path / f"{point}"], stderr=subprocess.PIPE, text=True, env=environment)
        for point in points
    }
    for point, process in started.items():
        while process.poll() is None and sum(psutil.Process(process.pid).cpu_times()[:2]) < point:
            time.sleep(0.02)
        process.send_signal(number)
    for process in started.values():
        _, said = process.communicate(timeout=60)
        assert "Traceback" not in said, said
        assert process.returncode in (0, 128 + number, -signal.SIGHUP), said
