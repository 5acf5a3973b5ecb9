"""Everything is in pyproject.toml, but the kernels that `make wheel` puts into wheels, where PETAL_PREBUILT is set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent / "kernels"))

from cpu.build import build
from cpu.isa import X86_64


class KernelsToo(build_py):
    """Compiles the kernels for every instruction set of x86-64 beside the Python files."""

    def run(self) -> None:
        super().run()
        folder = Path(self.build_lib, "petal/kernels/cpu/prebuilt")
        folder.mkdir(parents=True, exist_ok=True)
        for isa in X86_64:
            build(isa, folder / f"{isa.name}.so")


class Compiled(Distribution):
    """Goes where a machine's own files go, not those that all machines share."""

    def has_ext_modules(self) -> bool:
        return True


class AnyPython(bdist_wheel):
    """For one kind of machine and every Python: the kernels know nothing of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if "PETAL_PREBUILT" in os.environ:
    setup(cmdclass={"build_py": KernelsToo, "bdist_wheel": AnyPython}, distclass=Compiled)
else:
    setup()
