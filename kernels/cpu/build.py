"""The C kernels of this folder: compiled for this machine at first use, loaded once a process."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
# No -ffast-math: it would reorder sums. Contraction makes every a * b + c one fused multiply-add.
FLAGS = ["-O3", "-march=native", "-std=gnu11", "-fPIC", "-pthread", "-ffp-contract=fast"]


_threads: int | None = None


def threads() -> int:
    """Threads of the native kernels: torch's number, unless `set_threads` chose another."""
    return _threads or torch.get_num_threads()


def set_threads(count: int | None) -> None:
    """Give the native kernels a number of threads of their own; None follows torch again."""
    global _threads
    _threads = count


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where `PETAL_NATIVE=0` is set, there is no C compiler or the build fails.

    `PETAL_NATIVE=portable` leaves the matrix unit out: bits as on any processor, for exact mode over mixed machines.
    `PETAL_NATIVE_FLAGS` adds flags of the compiler, such as a sanitizer's. Built files are kept in
    `$XDG_CACHE_HOME/petal/native` (default `~/.cache`). Calls release the interpreter lock.
    """
    if os.environ.get("PETAL_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(_built()))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        log.warning("no native kernels, using slower torch code: %s", detail[0] if detail else error)
        return None


@functools.cache
def function(name: str, *arguments: type, returns: type | None = None) -> Callable[..., Any] | None:
    """A function of the library with the types of its arguments; None where there is no library."""
    kernels = library()
    if kernels is None:
        return None
    found = kernels[name]
    found.argtypes, found.restype = arguments, returns
    return found


def _built() -> Path:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    flags = [*FLAGS, *shlex.split(os.environ.get("PETAL_NATIVE_FLAGS", ""))]
    if os.environ.get("PETAL_NATIVE") == "portable":
        flags.append("-DPETAL_PORTABLE")
    files = sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")])
    version = _run([*compiler, "--version"])
    identity = [*compiler, *flags, version, _cpu(), *(file.read_text() for file in files)]
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "petal" / "native"
    target = cache / f"{digest}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            _run([*compiler, *flags, "-c", *(str(file) for file in files if file.suffix == ".c")], folder)
            objects = sorted(str(file) for file in Path(folder).glob("*.o"))
            _run([*compiler, *flags, "-shared", "-o", "out.so", *objects, "-lm"], folder)
            os.replace(Path(folder) / "out.so", target)  # atomic: several processes may build at once
    return target


def _cpu() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _run(command: list[str], folder: str | None = None) -> str:
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=120).stdout
