"""The activation of gated MLPs in one native call; torch needs two and a copy between."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build as native

_ARGUMENTS = (*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 2)


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU: Shazeer, arXiv 2002.05202), float32 on the CPU, of one shape; a value depends on its
    two alone."""
    function = native.function("petal_silu_gate", *_ARGUMENTS)
    if function is None:
        return F.silu(gate) * up
    gate, up = gate.contiguous(), up.contiguous()
    if gate.shape != up.shape or not gate.dtype == up.dtype == torch.float32:
        raise ValueError(f"a gate of {tuple(gate.shape)} {gate.dtype} for {tuple(up.shape)} {up.dtype}")
    y = torch.empty_like(up)
    function(y.data_ptr(), gate.data_ptr(), up.data_ptr(), up.numel(), native.threads())
    return y
