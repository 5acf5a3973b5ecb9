"""The order in which integer products read weights: lanes of 16 rows side by side (integer.h)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANE = 16
DEPTH = 4  # codes of a row that stay neighbours
RUN = 64  # depth that the kernels take at once, where groups allow it
MIDDLE = 128  # zero of codes of a byte, which the kernels read without a sign
SHARE = 32  # depth whose four-bit codes pair up


def by_lanes(rows: Tensor, unit: int = 1) -> Tensor:
    """[out, n] -> [⌈out / 16⌉, n / unit, 16, unit], rows past `out` zero."""
    padded = F.pad(rows, (0, 0, 0, -len(rows) % LANE))
    return padded.view(len(padded) // LANE, LANE, rows.shape[1] // unit, unit).transpose(1, 2).contiguous()


def by_rows(lanes: Tensor, out: int) -> Tensor:
    """What `by_lanes` was given."""
    return lanes.transpose(1, 2).flatten(2).flatten(0, 1)[:out]


def take_rows(lanes: Tensor, which: Tensor) -> Tensor:
    """Some rows of what `by_lanes` was given: which [n] -> [n, ...]."""
    return lanes[which // LANE, :, which % LANE].flatten(1)


def pair(codes: Tensor) -> Tensor:
    """uint8 [..., 32n] below 16 -> [..., 16n]: of each run of 32, depths d and d + 16 share a byte, the first low."""
    low, high = codes.unflatten(-1, (-1, 2, SHARE // 2)).unbind(-2)
    return (low | high << 4).flatten(-2)


def split(pairs: Tensor) -> Tensor:
    """What `pair` was given."""
    runs = pairs.unflatten(-1, (-1, SHARE // 2))
    return torch.stack((runs & 15, runs >> 4), -2).flatten(-3)
