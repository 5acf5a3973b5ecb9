"""Backends by what a person calls a device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from .backend import Backend
from .cpu.backend import CpuBackend, NoNativeKernels
from .cpu.build import Building
from .cpu.isa import NoSuchISA
from .cuda.backend import CudaBackend, NoKernels
from .torch.backend import TorchBackend

log = logging.getLogger(__name__)

DRIVER = Path("/dev/nvidiactl")  # there where a driver of NVIDIA's is


class NoBackend(ValueError):
    """There is no such device, or not as PETAL_ISA wants it; the message is one sentence that says what there is."""


def backend_for(device: str = "cpu", building: Building | None = None) -> Backend:
    """A backend for one span: "auto", "cpu", or a device of torch's such as "cuda:1". Raises NoBackend.

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


def _auto(device: str, building: Building | None) -> Backend:
    """The card with most memory free, if there is one that computes; else the CPU."""
    if torch.cuda.is_available():
        free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
        return backend_for(f"cuda:{free.index(max(free))}", building)
    if DRIVER.exists() and torch.version.cuda is not None:
        try:
            _there("cuda")
        except NoBackend as error:
            log.warning("this machine has an NVIDIA card, but %s; computing on the CPU", str(error).rstrip("."))
    return backend_for("cpu", building)


def _cuda(device: str, building: Building | None) -> Backend:
    _there(device)
    index = torch.device(device).index
    try:
        return CudaBackend(torch.device("cuda", torch.cuda.current_device() if index is None else index))
    except NoKernels as error:
        log.warning("%s", error)
        return _torch(device, building)


def _rocm(device: str, building: Building | None) -> Backend:
    """torch calls AMD's cards "cuda"."""
    if torch.version.hip is None:
        raise NoBackend(f"the device {device!r} cannot be used here: this torch is built without ROCm.")
    return _torch(device.replace("rocm", "cuda"), building)


def _torch(device: str, building: Building | None) -> Backend:
    _there(device)
    log.warning("%s computes through torch, without kernels of our own: that is slow", device)
    return TorchBackend(torch.device(device))


def _there(device: str) -> None:
    """Raise NoBackend unless torch can use a device."""
    kind, _, index = device.partition(":")
    try:
        if kind == "cuda" and 0 < (count := torch.cuda.device_count()) <= int(index or 0):
            raise RuntimeError(f"the cards here are cuda:0 to cuda:{count - 1}")
        torch.zeros(1, device=device)
    except torch.OutOfMemoryError as error:
        raise NoBackend(f"the device {device!r} cannot be used here: other programs fill its memory.") from error
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise NoBackend(f"the device {device!r} cannot be used here: {reason}.") from error


BACKENDS: dict[str, Callable[[str, Building | None], Backend]] = {
    "auto": _auto,
    "cpu": _cpu,
    "cuda": _cuda,
    "rocm": _rocm,
    **dict.fromkeys(("mps", "xpu"), _torch),
}
