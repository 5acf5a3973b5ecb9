"""Two four-bit codes a byte: as checkpoints pair them, and in the order that the kernels read."""

from __future__ import annotations

import torch
from torch import Tensor

RUN = 64  # depth that the kernels take at once


def pair(codes: Tensor) -> Tensor:
    """uint8 [..., 2n] below 16 -> [..., n], even depths in the low halves."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def split(pairs: Tensor) -> Tensor:
    """What `pair` was given."""
    return torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)


def interleave(codes: Tensor) -> Tensor:
    """uint8 [out, 64n] below 16 -> [out, 32n]: of each run of 64, a 16-bit word holds depths w, w + 16, w + 32, w + 48.

    So a shift of the words by 0 and 4, or by 8 and 12, leaves 32 neighbours in the low bits, ready for a table.
    """
    first, second, third, fourth = codes.unflatten(-1, (-1, 4, 16)).unbind(-2)
    return torch.stack((first | second << 4, third | fourth << 4), -1).flatten(-3)


def deinterleave(words: Tensor) -> Tensor:
    """What `interleave` was given."""
    low, high = words.unflatten(-1, (-1, 16, 2)).unbind(-1)
    return torch.stack((low & 15, low >> 4, high & 15, high >> 4), -2).flatten(-3)
