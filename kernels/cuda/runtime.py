"""One card: what is planned, compiled and loaded for it."""

from __future__ import annotations

import functools

import torch

from . import driver
from .compile import Program, Programs
from .driver import Kernel, Module
from .tiling import Card

OLDEST = (8, 0)  # compute capability that the sources compile for


class Runtime:
    """The kernels of one card. Raises NvrtcError where nothing can be compiled for it."""

    def __init__(self, device: torch.device) -> None:
        found = torch.cuda.get_device_properties(device)
        self.device = device
        shared = driver.attribute(self.device, driver.SHARED_OF_A_BLOCK)
        self.card = Card((found.major, found.minor), found.multi_processor_count, shared)
        self.programs = Programs.on(self.card.capability, driver.version())
        self._modules: dict[Program, Module] = {}
        self._kernels: dict[tuple[Program, str, int, int], Kernel] = {}

    def kernel(self, program: Program, name: str, threads: int, shared: int = 0, *, wait: bool = True) -> Kernel | None:
        """A function of a program; None while it is compiled, if not to `wait` for that.

        Raises NvrtcError where it cannot be compiled, DriverError where it cannot be loaded.
        """
        key = (program, name, threads, shared)
        if key not in self._kernels:
            if program not in self._modules:
                code = self.programs.start(program).result() if wait else self.programs.ready(program)
                if code is None:
                    return None
                self._modules[program] = Module(code, self.device)
            self._kernels[key] = self._modules[program].kernel(name, threads, shared)
        return self._kernels[key]


@functools.cache
def runtime(device: torch.device) -> Runtime:
    """The card's runtime, one a process."""
    return Runtime(device)
