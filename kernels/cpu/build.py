"""The C kernels of this folder, compiled for one instruction set where no file of them is at hand."""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .isa import ISA

SOURCES = Path(__file__).parent / "src"
# No -ffast-math: it would reorder sums. Contraction makes every a * b + c one fused multiply-add.
FLAGS = ["-O3", "-std=gnu11", "-fPIC", "-pthread", "-ffp-contract=fast"]

# How many files are compiled, of how many.
Building = Callable[[int, int], None]


def quietly(done: int, total: int) -> None:
    """A `Building` that tells nobody."""


def compiled(isa: ISA, building: Building = quietly) -> Path:
    """The kernels' file for `isa`, compiled where it is not kept from another run; `building` hears of that.

    `CC` names the compiler, `PETAL_CFLAGS` adds flags, such as a sanitizer's. Files are kept in
    `$XDG_CACHE_HOME/petal/native` (default `~/.cache`), or for this run alone where nothing can be written there.
    Raises FileNotFoundError where there is no compiler, OSError or SubprocessError where it fails.
    """
    command = _command(isa)
    files = sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")])
    identity = [*command, _run([command[0], "--version"]), _cpu(), *(file.read_text() for file in files)]
    cache = _cache()
    target = cache / f"{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:24]}.so"
    if not target.exists():
        build(isa, target, building)
    return target


def build(isa: ISA, target: Path, building: Building = quietly) -> None:
    """Compile the kernels for `isa` to `target`, whose folder is there, as many files at a time as there are cores."""
    command, sources = _command(isa), sorted(SOURCES.glob("*.c"))
    building(0, len(sources))
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = pool.map(lambda file: _run([*command, "-c", str(file)], folder), sources)
            for done, _ in enumerate(compiling, 1):
                building(done, len(sources))
        _run([*command, "-shared", "-o", "out.so", *(f"{file.stem}.o" for file in sources), "-lm"], folder)
        os.replace(Path(folder) / "out.so", target)  # atomic: several processes may build at once


def _command(isa: ISA) -> list[str]:
    added = shlex.split(os.environ.get("PETAL_CFLAGS", ""))
    return [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, *isa.flags, *added]


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
