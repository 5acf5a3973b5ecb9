"""Backends by what a person calls a device."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from .backend import Backend
from .cpu.backend import CpuBackend, NoNativeKernels
from .cpu.build import Building
from .cpu.isa import NoSuchISA
from .cuda.backend import CudaBackend, NoKernels
from .torch.backend import TorchBackend

log = logging.getLogger(__name__)


class NoBackend(ValueError):
    """There is no such device, or not as PETAL_ISA wants it; the message is one sentence that says what there is."""


def backend_for(device: str = "cpu", building: Building | None = None) -> Backend:
    """A backend for one span: "cpu", or a device of torch's such as "cuda:1". Raises NoBackend.

    `building` hears how many files of kernels are compiled, of how many, where that is yet to be done.
    """
    kind = device.partition(":")[0]
    if kind not in BACKENDS:
        raise NoBackend(f"there is no backend for the device {device!r}: choose one of {', '.join(BACKENDS)}.")
    return BACKENDS[kind](device, building)


def _cpu(device: str, building: Building | None) -> Backend:
    if device != "cpu":
        raise NoBackend(f"there is one CPU, so no {device!r}: say cpu.")
    try:
        return CpuBackend(building)
    except NoNativeKernels:  # said where they were looked for
        return TorchBackend(torch.device("cpu"))
    except NoSuchISA as error:
        raise NoBackend(str(error)) from error


def _cuda(device: str, building: Building | None) -> Backend:
    _there(device)
    index = torch.device(device).index
    try:
        return CudaBackend(torch.device("cuda", torch.cuda.current_device() if index is None else index))
    except NoKernels as error:
        log.warning("%s", error)
        return _torch(device, building)


def _torch(device: str, building: Building | None) -> Backend:
    _there(device)
    log.warning("%s computes through torch, without kernels of our own: that is slow", device)
    return TorchBackend(torch.device(device))


def _there(device: str) -> None:
    """Raise NoBackend unless torch can use a device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise NoBackend(f"the device {device!r} cannot be used here: {reason}.") from error


BACKENDS: dict[str, Callable[[str, Building | None], Backend]] = {
    "cpu": _cpu,
    "cuda": _cuda,
    **dict.fromkeys(("mps", "xpu"), _torch),
}
