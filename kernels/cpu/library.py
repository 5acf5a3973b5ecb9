"""The C kernels as this process loads them: prebuilt ones of the wheel, or compiled here."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .build import Building, compiled, quietly
from .isa import ISA, TORCH, VARIABLE, NoSuchISA, allowed

log = logging.getLogger(__name__)

# Made by `make wheel`; a checkout has none.
PREBUILT = Path(__file__).parent / "prebuilt"
NO_COMPILER = "install a C compiler, as with apt install gcc, dnf install gcc or apk add build-base"


class Kernels(NamedTuple):
    """A file of kernels, and what it was compiled for."""

    path: Path
    isa: ISA


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
def kernels(building: Building | None = None, arithmetic: str = "") -> Kernels | None:
    """The best kernels for this processor, of that arithmetic where one is named; None where torch must compute.

    `building` hears how many files are compiled, of how many, where no prebuilt ones fit. `PETAL_ISA` names an
    instruction set in place of the best, or `torch`. Raises NoSuchISA where that cannot be had.
    """
    trouble = "no instruction set of this processor's is known"
    for isa in allowed():
        if arithmetic in ("", isa.arithmetic):
            try:
                return _fitting(isa, building or quietly)
            except FileNotFoundError:
                trouble = NO_COMPILER
            except (OSError, subprocess.SubprocessError) as error:
                detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
                trouble = detail[0] if detail else str(error)
    pin = os.environ.get(VARIABLE)
    if pin == TORCH or arithmetic:
        return None
    if pin:
        raise NoSuchISA(f"{VARIABLE}={pin} cannot be had here: {trouble}")
    log.warning("without kernels torch's own code computes, several times slower: %s", trouble)
    return None


def _fitting(isa: ISA, building: Building) -> Kernels:
    """Raises OSError, SubprocessError."""
    path = _prebuilt(isa) or compiled(isa, building)
    if isa.arithmetic == "amx" and not Library(path, 1).matrix_unit():
        raise OSError("the system lets no program use the processor's matrix unit")
    ctypes.CDLL(str(path))
    return Kernels(path, isa)


def _prebuilt(isa: ISA) -> Path | None:
    """None as well where the file cannot be loaded, as where the C library is older than it wants."""
    path = PREBUILT / f"{isa.name}.so"
    if path.exists() and "PETAL_CFLAGS" not in os.environ:
        with suppress(OSError):
            ctypes.CDLL(str(path))
            return path
    return None
