"""The instruction sets that the kernels are compiled for, and which of them this processor has."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# What the environment says in place of a choice by the processor; `TORCH` is no kernels at all.
VARIABLE, TORCH = "PETAL_ISA", "torch"


class NoSuchISA(ValueError):
    """What PETAL_ISA names is unknown, or this processor lacks it; one sentence that says what there is."""


@dataclass(frozen=True, eq=False)
class ISA:
    """One way to compile the kernels, whose products have the same bits as all others' of that `arithmetic`.

    `needs`: features of a processor as Linux calls them, each with the compiler's flag.
    """

    name: str
    needs: Mapping[str, str]
    arithmetic: str = "native"

    @property
    def flags(self) -> tuple[str, ...]:
        return tuple(self.needs.values()) or ("-march=native",)


_PORTABLE = {"ssse3": "-mssse3", "sse4_1": "-msse4.1", "sse4_2": "-msse4.2", "popcnt": "-mpopcnt"}
_AVX2 = {**_PORTABLE, "avx2": "-mavx2", "fma": "-mfma", "f16c": "-mf16c", "bmi1": "-mbmi", "bmi2": "-mbmi2"}
_AVX512 = {
    **_AVX2,
    **{f"avx512{part}": f"-mavx512{part}" for part in ("f", "cd", "bw", "dq", "vl")},
    "avx512_vnni": "-mavx512vnni",
}
_BF16 = {**_AVX512, "avx512vbmi": "-mavx512vbmi", "avx512_bf16": "-mavx512bf16"}
_AMX = {**_BF16, "amx_tile": "-mamx-tile", "amx_int8": "-mamx-int8", "amx_bf16": "-mamx-bf16"}

# The best first: Sapphire Rapids, Zen 4, Cascade Lake, Haswell, Nehalem and what came after them. The matrix unit sums
# bfloat16 products in an order of its own; without fused multiply-adds every product is rounded before it is added.
X86_64 = (
    ISA("amx", _AMX, "amx"),
    ISA("avx512bf16", _BF16),
    ISA("avx512", _AVX512),
    ISA("avx2", _AVX2),
    ISA("portable", _PORTABLE, "portable"),
)
# Other processors, all of which fuse: whatever the compiler finds.
NATIVE = ISA("native", {})


def isas(root: Path = Path("/")) -> list[ISA]:
    """Those that this processor has, the best first; the system's files are at `root`."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return [NATIVE]
    features = _features(root)
    return [NATIVE] if features is None else [isa for isa in X86_64 if isa.needs.keys() <= features]


def allowed(root: Path = Path("/")) -> list[ISA]:
    """What may be tried, the best first: what PETAL_ISA names, else all that there are. Raises NoSuchISA."""
    there, pin = isas(root), os.environ.get(VARIABLE, "")
    if pin in ("", TORCH):
        return [] if pin else there
    if found := [isa for isa in there if isa.name == pin]:
        return found
    names = ", ".join([*(isa.name for isa in there), TORCH])
    fault = "this processor lacks" if pin in {isa.name for isa in (*X86_64, NATIVE)} else "there is no"
    raise NoSuchISA(f"{VARIABLE}={pin}: {fault} {pin}; choose one of {names}, or leave it out")


def _features(root: Path) -> set[str] | None:
    """Of the processor, as Linux lists them; None elsewhere."""
    try:
        lines = (root / "proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), None)
