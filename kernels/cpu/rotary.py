"""Rotary positions in one native call; torch needs six."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import build as native

_ARGUMENTS = (*[ctypes.c_void_p] * 3, *[ctypes.c_long] * 5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the heads of x by their rows' positions, in place (RoPE: Su et al., arXiv 2104.09864). Returns x.

    x: [rows, heads, width] float32 on the CPU, heads side by side. cos, sin: [rows, width], both halves given.
    """
    rows, heads, width = x.shape
    if cos.shape != (rows, width) or sin.shape != (rows, width) or width % 2:
        raise ValueError(f"angles {tuple(cos.shape)} for heads {tuple(x.shape)}")
    function = native.function("petal_rotate", *_ARGUMENTS)
    if function is None:
        left, right = x.chunk(2, dim=-1)
        return x.copy_(x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None])
    if x.dtype != torch.float32 or x.stride()[1:] != (width, 1) or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError("heads are float32 and side by side, angles contiguous")
    function(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, heads, width, x.stride(0), native.threads())
    return x
