"""The norm of the Llama kind on a card."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from .elementwise import MOST_NORMED, Elementwise


class RMSNorm(nn.Module):
    """See `Backend.rms_norm`. `plain`: whether our kernel computes it."""

    weight: Tensor

    def __init__(self, small: Elementwise, weight: Tensor, epsilon: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self._small, self.epsilon = small, epsilon
        self.plain = len(weight) % 8 == 0 and len(weight) <= MOST_NORMED
        self.scale = weight.float().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        if not self.plain or x.dtype != torch.bfloat16 or not x.is_contiguous():
            return ops.rms_norm(x.float(), self.scale, self.epsilon).to(x.dtype)
        rows = x.view(-1, x.shape[-1])
        return self._small.norm(rows, self.scale, self.epsilon, torch.empty_like(rows)).view(x.shape)
