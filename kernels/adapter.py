"""What sits beside a linear and adds to its result."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backend import Backend


class LowRank(nn.Module):
    """y = up (down x): LoRA (arXiv 2106.09685), or the error that quantization left (ASER, arXiv 2411.07762)."""

    def __init__(self, backend: Backend, down: Tensor, up: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        """down: [rank, in], up: [out, rank], any scale multiplied in. Raises ValueError for other shapes."""
        super().__init__()
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
            raise ValueError(f"down {list(down.shape)} and up {list(up.shape)} do not make a low-rank product.")
        self.down, self.up = backend.linear(down, dtype=dtype), backend.linear(up, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]; a row's bits depend on that row alone."""
        return self.up(self.down(x))
