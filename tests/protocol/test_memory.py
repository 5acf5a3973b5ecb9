"""Memory that only caches files is there to be had."""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import pytest
from petal.protocol import memory


def test_available_is_what_the_system_says():
    assert memory.available_bytes() == pytest.approx(psutil.virtual_memory().available, rel=0.1)


def test_cached_files_take_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    full = "MemTotal: 1000 kB\nMemFree: 10 kB\nMemAvailable:     800 kB\nCached: 790 kB\n"
    (tmp_path / "meminfo").write_text(full)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.available_bytes() == 800 * 1024


def test_memory_in_use_is_not_there():
    """The negative control."""
    before = memory.available_bytes()
    with mmap.mmap(-1, size := 1 << 29) as block:
        for page in range(0, size, mmap.PAGESIZE):
            block[page] = 1
        assert memory.available_bytes() < before - size // 2


def test_a_system_that_says_nothing_does_not_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "missing")
    assert memory.available_bytes() >= 1 << 40
