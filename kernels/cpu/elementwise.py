"""Norm, rotary positions, gate and top-k, one native call each; torch needs several and copies between.

All take float32 on the CPU, and a row depends on itself alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .library import Library

MOST = 256


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x²) + epsilon) over the last axis (Zhang and Sennrich, arXiv 1910.07467)."""

    weight: Tensor

    def __init__(self, library: Library, weight: Tensor, epsilon: float) -> None:
        """weight: [width] float32."""
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.epsilon, self._library, self._address = epsilon, library, self.weight.data_ptr()

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] float32 -> the same shape."""
        x = x.contiguous()
        y = torch.empty_like(x)
        library, width, count = self._library, x.shape[-1], x.numel()
        library.rms_norm(
            y.data_ptr(), x.data_ptr(), self._address, width, self.epsilon, count // width, library.threads
        )
        return y


class Elementwise:
    """What a `Backend` asks for that is neither a product nor attention."""

    library: Library

    def rms_norm(self, weight: Tensor, epsilon: float) -> RMSNorm:
        """See `Backend`; float32."""
        return RMSNorm(self.library, weight, epsilon)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Turn the heads of x by their rows' positions, in place (RoPE: Su et al., arXiv 2104.09864). Returns x.

        x: [rows, heads, width], heads side by side. cos, sin: [rows, width], contiguous, both halves given.
        """
        rows, heads, width = x.shape
        if cos.shape != (rows, width) or sin.shape != (rows, width) or width % 2:
            raise ValueError(f"angles {tuple(cos.shape)} for heads {tuple(x.shape)}")
        if (
            x.dtype != torch.float32
            or x.stride()[1:] != (width, 1)
            or not (cos.is_contiguous() and sin.is_contiguous())
        ):
            raise ValueError("heads are float32 and side by side, angles contiguous")
        library = self.library
        library.rotate(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, heads, width, x.stride(0), library.threads)
        return x

    def silu_gate(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up (SwiGLU: Shazeer, arXiv 2002.05202), of one shape."""
        gate, up = gate.contiguous(), up.contiguous()
        if gate.shape != up.shape or not gate.dtype == up.dtype == torch.float32:
            raise ValueError(f"a gate of {tuple(gate.shape)} {gate.dtype} for {tuple(up.shape)} {up.dtype}")
        y = torch.empty_like(up)
        library = self.library
        library.silu_gate(y.data_ptr(), gate.data_ptr(), up.data_ptr(), up.numel(), library.threads)
        return y

    def topk(self, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The largest `count` values of each row [n, width] and their columns, [n, count] each; see `Backend.topk`."""
        if x.dim() != 2 or x.dtype != torch.float32 or not 0 < count <= min(MOST, x.shape[1]):
            raise ValueError(
                f"the top {count} of {tuple(x.shape)} {x.dtype}; rows of float32 and 1 to {MOST} are possible"
            )
        x = x.contiguous()
        values, columns = x.new_empty(len(x), count), x.new_empty(len(x), count, dtype=torch.int64)
        library = self.library
        library.topk(values.data_ptr(), columns.data_ptr(), x.data_ptr(), *x.shape, count, library.threads)
        return values, columns
