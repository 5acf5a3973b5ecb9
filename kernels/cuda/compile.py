"""Machine code of the CUDA sources for one card: compiled in the background at first need, kept on disk.

A program is a source file with values for its choices. Until its code is there callers use what stands in for it
(Triton, or torch); the result is the same to the bit where `kernels/NOTES.md` promises that.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..slow_work import slow_work
from . import nvrtc
from .nvrtc import NvrtcError

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
LIMIT = 60.0  # seconds that a compile may take
_DIGEST = 32  # bytes of a SHA-256, which precede the code in a file


@dataclass(frozen=True)
class Program:
    """A source file of `src/` and the values of its choices."""

    source: str
    choices: tuple[tuple[str, str | int], ...] = ()

    def options(self, architecture: str) -> list[str]:
        defines = [f"-D{name}={value}" for name, value in self.choices]
        return [f"--gpu-architecture={architecture}", "-std=c++17", "-default-device", *defines]


@functools.cache
def texts() -> dict[str, str]:
    """All sources by name."""
    return {path.name: path.read_text() for path in sorted(SOURCES.glob("*.cu*"))}


def architecture(capability: tuple[int, int]) -> str:
    """What the compiler calls a card of a compute capability: 9.0 has instructions that no other card has."""
    return "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"


class CubinCache:
    """Files of machine code, each under the digest of all that it depends on.

    Several processes may use the folder at once. A damaged file counts as missing. Where the folder cannot be written
    code lives as long as the process, which is said once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._memory: dict[str, bytes] = {}
        self._warned = False

    @classmethod
    def default(cls) -> CubinCache:
        """`$XDG_CACHE_HOME/petal/cuda` (default `~/.cache`)."""
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cls(home / "petal" / "cuda")

    def get(self, key: str) -> bytes | None:
        if key in self._memory:
            return self._memory[key]
        try:
            stored = (self.folder / key).read_bytes()
        except OSError:
            return None
        code = stored[_DIGEST:]
        return code if code and hashlib.sha256(code).digest() == stored[:_DIGEST] else None

    def put(self, key: str, code: bytes) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(file.name, self.folder / key)  # atomic: readers see the whole file or none
        except OSError as error:
            self._memory[key] = code
            if not self._warned:
                log.warning("compiled kernels cannot be kept in %s, they last as long as this process: %s",
                            self.folder, error.strerror)  # fmt: skip
                self._warned = True


class Compiler:
    """Compiles programs for one architecture, each in a process of its own that ends after `LIMIT` at the latest."""

    def __init__(self, architecture: str, driver: int = 0, limit: float = LIMIT) -> None:
        """driver: the version that the driver reports. Raises NvrtcError where no compiler knows the architecture."""
        path = nvrtc.library()
        if path is None:
            raise NvrtcError("no wheel of the run-time compiler (nvidia-cuda-nvrtc) is installed.")
        compiler = nvrtc.Nvrtc(path)
        number = int(architecture.removeprefix("sm_").rstrip("a"))
        if number not in compiler.architectures():
            raise NvrtcError(f"the run-time compiler {compiler.version()} does not know {architecture}.")
        self.architecture = architecture
        self._path = path
        self._limit = limit
        self._identity = (architecture, driver, compiler.version())

    def key(self, program: Program) -> str:
        """A digest of all that the code depends on."""
        identity = [self._identity, program.source, program.choices, sorted(texts().items())]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]

    def __call__(self, program: Program) -> bytes:
        """Raises NvrtcError with the first line of the log."""
        headers = {name: text for name, text in texts().items() if name.endswith(".cuh")}
        request = {
            "library": str(self._path),
            "source": texts()[program.source],
            "headers": headers,
            "options": program.options(self.architecture),
        }
        command = [sys.executable, "-I", nvrtc.__file__]
        try:
            with slow_work(self._limit):
                done = subprocess.run(
                    command, input=json.dumps(request).encode(), capture_output=True, timeout=self._limit, check=False
                )
        except subprocess.TimeoutExpired:
            raise NvrtcError(f"compiling {program.source} took more than {self._limit:.0f} s.") from None
        if done.returncode or not done.stdout:
            lines = done.stderr.decode(errors="replace").strip().splitlines()
            raise NvrtcError(lines[0] if lines else f"the compiler ended with status {done.returncode}.")
        return done.stdout


class Programs:
    """The machine code of programs, made in the background."""

    def __init__(
        self, compile: Callable[[Program], bytes], key: Callable[[Program], str], cache: CubinCache, workers: int = 0
    ) -> None:
        self._compile, self._key, self._cache = compile, key, cache
        self._workers = ThreadPoolExecutor(workers or min(16, os.cpu_count() or 1), "petal-nvrtc")
        self._lock = threading.Lock()
        self._started: dict[Program, Future[bytes]] = {}

    @classmethod
    def on(cls, capability: tuple[int, int], driver: int) -> Programs:
        """For a card of a compute capability. Raises NvrtcError where nothing can be compiled for it."""
        compiler = Compiler(architecture(capability), driver)
        return cls(compiler, compiler.key, CubinCache.default())

    def start(self, program: Program) -> Future[bytes]:
        """Begins to compile a program unless that was begun before; its code comes, or NvrtcError is raised, once."""
        with self._lock:
            if program not in self._started:
                self._started[program] = self._workers.submit(self._make, program)
            return self._started[program]

    def ready(self, program: Program) -> bytes | None:
        """The code, or None while it is made and where that failed; never waits."""
        future = self.start(program)
        return future.result() if future.done() and future.exception() is None else None

    def _make(self, program: Program) -> bytes:
        key = self._key(program)
        if (code := self._cache.get(key)) is not None:
            return code
        try:
            code = self._compile(program)
        except NvrtcError as error:
            log.warning("%s is not compiled, slower code stands in for it: %s", program.source, error)
            raise
        self._cache.put(key, code)
        return code
