"""The C kernels of this folder: compiled for this machine at first use, loaded once a process."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
# No -ffast-math: it would reorder sums. Contraction makes every a * b + c one fused multiply-add.
FLAGS = ["-O3", "-march=native", "-std=gnu11", "-fPIC", "-pthread", "-ffp-contract=fast"]


# How many files are compiled, of how many.
Building = Callable[[int, int], None]


class Library:
    """The loaded kernels: C functions with the types of their arguments, and how many threads their callers use.

    Calls release the interpreter lock. Raises OSError.
    """

    def __init__(self, path: Path, threads: int) -> None:
        loaded = ctypes.CDLL(str(path))
        self.threads = threads

        def function(name: str, pointers: int, *others: type, returns: type | None = None) -> Callable[..., Any]:
            found = loaded[f"petal_{name}"]
            found.argtypes, found.restype = [ctypes.c_void_p] * pointers + list(others), returns
            return found

        integer, real, status = ctypes.c_long, ctypes.c_double, ctypes.c_int
        self.linear = function("linear", 4, *[integer] * 5, returns=status)
        self.quantized = function("quantized", 4, *[integer] * 2, returns=status)
        self.integer = function("integer", 4, *[integer] * 2, returns=status)
        self.attention = function("attention", 1, returns=status)
        self.move_rows = function("move_rows", 2, integer, *[ctypes.c_void_p] * 2, integer, returns=status)
        self.rms_norm = function("rms_norm", 3, integer, real, *[integer] * 2)
        self.rotate = function("rotate", 3, *[integer] * 5)
        self.silu_gate = function("silu_gate", 3, *[integer] * 2)
        self.topk = function("topk", 3, *[integer] * 4)
        self.matrix_unit: Callable[[], int] = function("matrix_unit", 0, returns=status)


@functools.cache
def compiled(building: Building | None = None) -> Path | None:
    """The file of the kernels, or None where `PETAL_NATIVE=0` is set, there is no C compiler or the build fails.

    `building` hears how many files are compiled, of how many, where they are not at hand.

    `PETAL_NATIVE=portable` leaves the matrix unit out: bits as on any processor, for exact mode over mixed machines.
    `PETAL_NATIVE_FLAGS` adds flags of the compiler, such as a sanitizer's. Built files are kept in
    `$XDG_CACHE_HOME/petal/native` (default `~/.cache`), or for this run alone where nothing can be written there.
    """
    if os.environ.get("PETAL_NATIVE") == "0":
        return None
    try:
        path = _built(building or (lambda done, total: None))
        ctypes.CDLL(str(path))
        return path
    except FileNotFoundError:
        log.warning(
            "no C compiler: torch's own code computes, several times slower; install one, as with apt install gcc, "
            "dnf install gcc or apk add build-base"
        )
        return None
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.warning("no native kernels, using slower torch code: %s", detail[0] if detail else error)
        return None


def _built(building: Building = lambda done, total: None) -> Path:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = [*FLAGS, *shlex.split(os.environ.get("PETAL_NATIVE_FLAGS", ""))]
    if os.environ.get("PETAL_NATIVE") == "portable":
        flags.append("-DPETAL_PORTABLE")
    files = sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")])
    version = _run([*compiler, "--version"])
    identity = [*compiler, *flags, version, _cpu(), *(file.read_text() for file in files)]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    cache = _cache()
    target = cache / f"{digest}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            objects = _compile([*compiler, *flags], [file for file in files if file.suffix == ".c"], folder, building)
            _run([*compiler, *flags, "-shared", "-o", "out.so", *objects, "-lm"], folder)
            os.replace(Path(folder) / "out.so", target)  # atomic: several processes may build at once
    return target


def _compile(compiler: list[str], sources: list[Path], folder: str, building: Building) -> list[str]:
    """The object files, as many at a time as there are cores."""
    building(0, len(sources))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(lambda file: _run([*compiler, "-c", str(file)], folder), sources), 1):
            building(done, len(sources))
    return [f"{file.stem}.o" for file in sources]


def _cache() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "petal" / "native"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # a disk that cannot be written to, or a user without a home
        pass
    folder = Path(tempfile.mkdtemp(prefix="petal-native-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _run(command: list[str], folder: str | None = None) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120).stdout
