"""Root mean square norm in one native call; torch needs six."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from . import build as native

_ARGUMENTS = (*[ctypes.c_void_p] * 3, ctypes.c_long, ctypes.c_double, ctypes.c_long, ctypes.c_long)


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x²) + epsilon) over the last axis, float32 on the CPU; a row depends on itself alone.

    (Zhang and Sennrich, arXiv 1910.07467.)
    """

    weight: Tensor

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        """weight: [width] float32."""
        super().__init__()
        self.register_buffer("weight", weight.contiguous())
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] float32 -> the same shape."""
        function = native.function("petal_rms_norm", *_ARGUMENTS)
        if function is None:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon))
        x = x.contiguous()
        y = torch.empty_like(x)
        weight = self.weight
        width = weight.shape[0]
        rows = x.numel() // width
        function(y.data_ptr(), x.data_ptr(), weight.data_ptr(), width, self.epsilon, rows, native.threads())
        return y


def like(module: nn.Module) -> RMSNorm | None:
    """A norm that does what `module` does, found by trying; None where it is no such norm.

    Families spell the weight as itself or as an offset from one, and epsilon under several names.
    """
    weight = getattr(module, "weight", None)
    epsilon = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(epsilon, float):
        return None
    sample = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0))
    expected = module(sample)
    for candidate in (weight, 1 + weight):
        norm = RMSNorm(candidate.detach().float(), epsilon)
        if expected.shape == sample.shape and torch.allclose(norm(sample), expected, rtol=1e-5, atol=1e-6):
            return norm
    return None
