"""The ways to quantize, by the name of their format."""

from __future__ import annotations

from ...protocol.checkpoint.layout import CheckpointError
from .aqlm import AqlmMethod
from .int4 import Int4Method
from .method import Method
from .spqr import SpqrMethod

FORMATS = ("aqlm", "spqr", "int4")


def method_for(format: str, seed: int) -> Method:
    """The method of a format. Raises CheckpointError for an unknown one."""
    if format == "aqlm":
        return AqlmMethod(seed)
    if format == "spqr":
        return SpqrMethod()
    if format == "int4":
        return Int4Method()
    raise CheckpointError(f"{format} is no format that needs calibration: give one of {', '.join(FORMATS)}.")
