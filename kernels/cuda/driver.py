"""The few calls of NVIDIA's driver that torch does not offer: load machine code, launch it with attributes."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_SHARED_BYTES, _REGISTERS, _LOCAL_BYTES, _MOST_SHARED = 1, 4, 3, 8  # CUfunction_attribute
SHARED_OF_A_BLOCK = 97  # CUdevice_attribute: bytes that a kernel may ask for
_PROGRAMMATIC_SERIALIZATION = 6  # CUlaunchAttributeID


class DriverError(RuntimeError):
    """A call of the driver failed."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_byte * 64)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: object) -> None:
    if status := _driver()[name](*arguments):
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise DriverError(f"{name}: {(text.value or b'unknown error').decode()} ({status})")


def version() -> int:
    """What the driver supports, as 13000 for CUDA 13.0."""
    found = ctypes.c_int()
    _call("cuDriverGetVersion", ctypes.byref(found))
    return found.value


def attribute(device: torch.device, which: int) -> int:
    """A CUdevice_attribute of a device."""
    handle, found = ctypes.c_int(), ctypes.c_int()
    _call("cuDeviceGet", ctypes.byref(handle), device.index or 0)
    _call("cuDeviceGetAttribute", ctypes.byref(found), which, handle)
    return found.value


class Module:
    """Machine code loaded on one device. Raises DriverError for code that the device cannot run."""

    def __init__(self, code: bytes, device: torch.device) -> None:
        self._handle = ctypes.c_void_p()
        self._code = code
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # torch's context is current from here on
            _call("cuModuleLoadData", ctypes.byref(self._handle), code)

    def kernel(self, name: str, threads: int, shared: int = 0) -> Kernel:
        """shared: bytes of dynamic shared memory a block."""
        function = ctypes.c_void_p()
        _call("cuModuleGetFunction", ctypes.byref(function), self._handle, name.encode())
        return Kernel(self, function, threads, shared)


class Kernel:
    """A function of a module with the size of its blocks."""

    def __init__(self, module: Module, function: ctypes.c_void_p, threads: int, shared: int) -> None:
        self._module, self._function = module, function
        self.threads, self.shared = threads, shared
        if shared:
            _call("cuFuncSetAttribute", function, _MOST_SHARED, shared)
        self._overlapping = (_Attribute * 1)()
        self._overlapping[0].id = _PROGRAMMATIC_SERIALIZATION
        self._overlapping[0].value[0] = 1

    @property
    def registers(self) -> int:
        return self._attribute(_REGISTERS)

    @property
    def spilled(self) -> int:
        """Bytes of local memory a thread."""
        return self._attribute(_LOCAL_BYTES)

    def resident(self) -> int:
        """Blocks that a multiprocessor holds at once."""
        found = ctypes.c_int()
        _call(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            ctypes.byref(found),
            self._function,
            self.threads,
            ctypes.c_size_t(self.shared),
        )
        return found.value

    def __call__(self, grid: Sequence[int], *arguments: Tensor | int | float | None, overlap: bool = False) -> None:
        """Launches on torch's current stream; None is a null pointer, an int 32 bits wide.

        overlap: it may start while the kernel before it ends, and waits for that one's results itself.
        """
        values = [_argument(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        config = _Config(
            (*grid, 1, 1)[:3],
            (self.threads, 1, 1),
            self.shared,
            torch.cuda.current_stream().cuda_stream,
            self._overlapping,
            int(overlap),
        )
        _call("cuLaunchKernelEx", ctypes.byref(config), self._function, pointers, None)

    def _attribute(self, which: int) -> int:
        found = ctypes.c_int()
        _call("cuFuncGetAttribute", ctypes.byref(found), which, self._function)
        return found.value


def _argument(value: Tensor | int | float | None) -> ctypes.c_void_p | ctypes.c_int | ctypes.c_float:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    return ctypes.c_int(value) if isinstance(value, int) else ctypes.c_float(value)
