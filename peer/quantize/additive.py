"""Additive codebooks of one matrix, and the quadratic error that their codes and vectors are fitted to.

AQLM (Egiazarian et al. 2024, arXiv:2401.06118), equations 2 to 8. With H the covariance of the inputs, the error is
tr((W − Ŵ) H (W − Ŵ)ᵀ). Its minimum is searched by turns: codes by beam search, scales in closed form, vectors by
conjugate gradients, exact where AQLM takes Adam steps, as the error is quadratic in them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .kmeans import assign, kmeans

_KMEANS_ITERATIONS = 20


@dataclass
class Additive:
    """w[o, j] = scales[o] · Σ_c codebooks[c, codes[o, j, c]] for group j of 8 columns.

    codebooks [C, K, 8] and scales [out] in float32, codes int64 [out, in / 8, C].
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    @classmethod
    def start(cls, weight: Tensor, books: int, size: int, group: int, noise: torch.Generator) -> Additive:
        """Residual k-means: each codebook of `size` vectors is fitted to what those before it leave."""
        scales = (weight**2).mean(1).sqrt().clamp(min=torch.finfo(torch.float16).tiny)
        left = (weight / scales[:, None]).view(-1, group)
        codes, codebooks = [], []
        for _ in range(books):
            centres = kmeans(left, size, _KMEANS_ITERATIONS, noise)
            nearest = assign(left, centres)
            left = left - centres[nearest]
            codes.append(nearest.view(len(weight), -1))
            codebooks.append(centres)
        return cls(torch.stack(codes, 2), torch.stack(codebooks), scales)

    def unscaled(self, codebooks: Tensor | None = None) -> Tensor:
        """[out, in] without the scales, of these codebooks or of others."""
        books = self.codebooks if codebooks is None else codebooks
        vectors = [F.embedding(self.codes[..., c], book) for c, book in enumerate(books)]
        return torch.stack(vectors).sum(0).flatten(1)

    def dense(self) -> Tensor:
        """[out, in]."""
        return self.unscaled() * self.scales[:, None]

    def as_stored(self) -> None:
        """Round to what a checkpoint holds, float16."""
        self.codebooks, self.scales = self.codebooks.half().float(), self.scales.half().float()


def fit_scales(parts: Additive, weight: Tensor, covariance: Tensor) -> None:
    """The best scale of each row."""
    unscaled = parts.unscaled()
    seen = unscaled @ covariance
    own, shared = (seen * unscaled).sum(1), (seen * weight).sum(1)
    parts.scales = torch.where((own > 0) & (shared > 0), shared / own, parts.scales)


def fit_codebooks(parts: Additive, weight: Tensor, covariance: Tensor, steps: int) -> None:
    """Conjugate gradient steps on the codebooks; the error never rises."""
    squared = parts.scales[:, None] ** 2

    def hessian(codebooks: Tensor) -> Tensor:
        return _by_vector(parts, (parts.unscaled(codebooks) * squared) @ covariance)

    aim = _by_vector(parts, (weight * parts.scales[:, None]) @ covariance)
    solution = parts.codebooks
    residual = aim - hessian(solution)
    direction, size = residual, (residual**2).sum()
    least = 1e-8 * size
    for _ in range(steps):
        curved = hessian(direction)
        slope = (direction * curved).sum()
        if not bool((size > least) & (slope > 0)):
            break
        solution = solution + size / slope * direction
        residual = residual - size / slope * curved
        size, before = (residual**2).sum(), size
        direction = residual + size / before * direction
    parts.codebooks = solution


def _by_vector(parts: Additive, gradient: Tensor) -> Tensor:
    """Sums of a gradient by the weights [out, in] over the places of each codebook vector, [C, K, 8]."""
    groups = gradient.view(-1, parts.codebooks.shape[2])
    sums = torch.zeros_like(parts.codebooks)
    for c, book in enumerate(sums):
        book.index_add_(0, parts.codes[..., c].flatten(), groups)
    return sums
