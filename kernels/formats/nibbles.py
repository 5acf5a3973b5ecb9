"""Two four-bit codes a byte, as checkpoints pair them."""

from __future__ import annotations

import torch
from torch import Tensor


def pair(codes: Tensor) -> Tensor:
    """uint8 [..., 2n] below 16 -> [..., n], even depths in the low halves."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def split(pairs: Tensor) -> Tensor:
    """What `pair` was given."""
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
