"""The kernels' file: found, compiled and kept, or done without."""

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from petal.kernels.cpu import build, library
from petal.kernels.cpu.isa import isas
from petal.kernels.cpu.library import kernels

from .conftest import fresh_kernels


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("PETAL_ISA", raising=False)
    with fresh_kernels():
        yield


def test_no_second_openmp_runtime_is_mapped():
    """Two of them would fight for the cores: the kernels bring threads of their own, and no OpenMP."""
    if kernels() is None or not Path("/proc/self/maps").exists():
        pytest.skip("no C compiler or no /proc")
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert all(Path(torch.__file__).parent in Path(path).parents for path in mapped)


def test_build_is_reused_and_leaves_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if kernels() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PETAL_CFLAGS", "-O0")  # built in a second or two
    code = "from petal.kernels.cpu.library import kernels; assert kernels()"
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (built,) = (tmp_path / "petal" / "native").iterdir()
    before = built.stat().st_mtime_ns
    assert build.compiled(isas()[0]) == built
    assert built.stat().st_mtime_ns == before


def test_a_build_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if kernels() is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PETAL_CFLAGS", "-O0")
    steps: list[tuple[int, int]] = []
    assert kernels(lambda *step: steps.append(step))
    total = len(list(build.SOURCES.glob("*.c")))
    assert steps == [(done, total) for done in range(total + 1)]
    assert kernels(lambda *step: steps.append(step))
    assert len(steps) == total + 1, "what is there is not built again"


@pytest.mark.full
def test_a_build_in_a_fresh_home_takes_seconds(tmp_path: Path):
    """Said line by line meanwhile; its quick twin is above."""
    if kernels() is None:
        pytest.skip("no C compiler")
    code = (
        "import time; from petal.kernels.cpu.build import compiled; from petal.kernels.cpu.isa import isas;"
        "start = time.monotonic(); compiled(isas()[0]); print(time.monotonic() - start)"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    print(f"\nthe kernels are compiled in {float(done.stdout):.1f} s")
    assert float(done.stdout) <= 15


def test_without_a_home_the_build_is_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build._cache().is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert build._cache().is_dir()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_no_compiler_is_one_warning(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(library, "PREBUILT", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert kernels() is None
        assert kernels() is None
    assert len(caplog.records) == 1
    assert "\n" not in caplog.text.strip()


def test_switched_off_by_environment():
    code = (
        "import torch; from petal.kernels.registry import backend_for; backend = backend_for();"
        "assert backend.name == 'torch'; x = torch.randn(3, 40); w = torch.randn(50, 40);"
        "torch.testing.assert_close(backend.linear(w)(x), x @ w.T)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PETAL_ISA": "torch"})


def test_threads_are_left_as_they_were():
    before = torch.get_num_threads()
    kernels()
    assert torch.get_num_threads() == before


def test_what_memory_lacks_is_said_and_not_an_end_of_the_process():
    found = kernels()
    if found is None:
        pytest.skip("no C compiler")
    scratch = ctypes.CDLL(str(found.path)).scratch
    scratch.argtypes, scratch.restype = [ctypes.c_int, ctypes.c_long], ctypes.c_void_p
    for room in range(4):
        assert scratch(room, 1 << 60) is None
        assert scratch(room, 0) is not None
        first = scratch(room, 5000)
        assert scratch(room, 4999) == first
