"""The C kernels under the compiler's sanitizers of addresses and of undefined behaviour."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.imports import ROOT

# -O2: below it gcc leaves a * b + c as two roundings, and processors differ in their bits.
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -g -O2"
COMPILER = shlex.split(os.environ.get("CC", "cc"))
CALL = """
import torch
from petal.kernels.cpu.backend import CpuBackend
gate = CpuBackend().library.silu_gate
y, x, up = torch.zeros(3, 4096)
gate(y.data_ptr(), x.data_ptr() + {offset}, up.data_ptr(), {count}, 1)
print("unnoticed")
"""

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]


def sanitized(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python with kernels that end the process, and say why, at the first fault."""
    runtimes = []
    for name in ("libasan.so", "libubsan.so"):
        found = subprocess.run([*COMPILER, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
        runtimes.append(found.stdout.strip())
    if not all(Path(runtime).is_absolute() for runtime in runtimes):
        pytest.skip("this compiler has no sanitizers")
    environment = {
        "LD_PRELOAD": " ".join(runtimes),  # the interpreter itself knows nothing of them
        # Leaks are Python's own, at its end; a kernel that gets no memory says so, and a test asks for too much.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "CC": shlex.join(["env", "-u", "LD_PRELOAD", *COMPILER]),  # the compiler knows nothing of them, and is fast
        "PETAL_CFLAGS": FLAGS,
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


FILES = sorted(path.name for path in Path(__file__).parent.glob("test_*.py") if path.name != Path(__file__).name)


@pytest.mark.parametrize("name", FILES)
def test_every_kernel(name: str) -> None:
    tests = ("-m", "not full", "-p", "no:xdist", "-p", "no:cacheprovider", "--capture", "no", f"tests/kernels/{name}")
    done = sanitized("-m", "pytest", *tests)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


def test_a_sound_call_passes() -> None:
    assert sanitized("-c", CALL.format(offset=0, count=4096)).stdout == "unnoticed\n"


@pytest.mark.parametrize(
    ("offset", "count", "words"),
    [(0, 3 * 4096 + 16, "heap-buffer-overflow"), (1, 4096 - 16, "misaligned address")],
    ids=["read behind the end", "undefined behaviour"],
)
def test_a_fault_is_noticed(offset: int, count: int, words: str) -> None:
    done = sanitized("-c", CALL.format(offset=offset, count=count))
    assert done.returncode != 0
    assert "unnoticed" not in done.stdout
    assert words in done.stderr
