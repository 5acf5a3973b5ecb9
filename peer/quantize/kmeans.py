"""Lloyd's k-means: where additive codebooks start."""

from __future__ import annotations

import torch
from torch import Tensor

# Distances that exist at a time.
_DISTANCES = 1 << 26
_SAMPLE = 64  # vectors for each centre are enough to place it


def kmeans(vectors: Tensor, count: int, iterations: int, noise: torch.Generator) -> Tensor:
    """Centres [count, d] of vectors [n, d]; centres that lose all vectors start again at random ones."""
    sample = vectors[_draw(len(vectors), min(len(vectors), _SAMPLE * count), noise)]
    centres = sample[_draw(len(sample), count, noise)].clone()
    for _ in range(iterations):
        nearest = assign(sample, centres)
        sums = torch.zeros_like(centres).index_add_(0, nearest, sample)
        members = torch.bincount(nearest, minlength=count)
        centres = torch.where(members[:, None] > 0, sums / members.clamp(min=1)[:, None], centres)
        lost = (members == 0).nonzero()[:, 0]
        centres[lost] = sample[_draw(len(sample), len(lost), noise)]
    return centres


def assign(vectors: Tensor, centres: Tensor) -> Tensor:
    """Index of the nearest centre, [n]."""
    half_norms = (centres**2).sum(1) / 2
    chunks = vectors.split(max(1, _DISTANCES // len(centres)))
    return torch.cat([(half_norms - chunk @ centres.T).argmin(1) for chunk in chunks])


def _draw(among: int, count: int, noise: torch.Generator) -> Tensor:
    """Indices [count], different ones as far as there are enough."""
    if not count:
        return torch.empty(0, dtype=torch.long, device=noise.device)
    order = torch.randperm(among, generator=noise, device=noise.device)
    return order.repeat(-(-count // among))[:count]
