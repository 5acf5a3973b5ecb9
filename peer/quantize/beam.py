"""Beam search for the codes of additive codebooks, against the covariance of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from .additive import Additive

# Candidates whose costs exist at a time.
_CANDIDATES = 1 << 27


def search_codes(parts: Additive, weight: Tensor, covariance: Tensor, width: int) -> None:
    """One pass over the groups: each takes the best codes found for it, all other groups as they are.

    weight: [out, in]. `width` hypotheses a row survive each codebook; codes change only where the error falls.
    """
    group = parts.codebooks.shape[2]
    scales = parts.scales[:, None]
    pull = (weight - parts.dense()) @ covariance / scales  # the error's gradient, halved, by the unscaled weights
    for j in range(parts.codes.shape[1]):
        columns = slice(j * group, (j + 1) * group)
        gram, codes = covariance[columns, columns], parts.codes[:, j]
        now = _vectors(parts.codebooks, codes)
        aim = pull[:, columns] + now @ gram
        found = _beam(aim, gram, parts.codebooks, width)
        vectors = _vectors(parts.codebooks, found)
        better = _cost(vectors, aim, gram) < _cost(now, aim, gram)
        parts.codes[:, j] = torch.where(better[:, None], found, codes)
        pull -= torch.where(better[:, None], vectors - now, 0) @ covariance[columns]


def _beam(aim: Tensor, gram: Tensor, codebooks: Tensor, width: int) -> Tensor:
    """Codes [out, C] with little q·G·q − 2 aim·q, q the sum of their vectors; aim [out, 8], gram G [8, 8]."""
    size = codebooks.shape[1]
    rows = max(1, _CANDIDATES // (size * width))
    return torch.cat([_beam_rows(part, gram, codebooks, min(width, size)) for part in aim.split(rows)])


def _beam_rows(aim: Tensor, gram: Tensor, codebooks: Tensor, width: int) -> Tensor:
    out, group = aim.shape
    sums = aim.new_zeros(out, 1, group)
    costs = aim.new_zeros(out, 1)
    codes = torch.zeros(out, 1, 0, dtype=torch.long, device=aim.device)
    for c, book in enumerate(codebooks):
        kept = width if c + 1 < len(codebooks) else 1
        own = ((book @ gram) * book).sum(1)
        added = costs[..., None] + own - 2 * (aim[:, None] - sums @ gram) @ book.T
        costs, best = added.flatten(1).topk(kept, largest=False)
        parent, code = best // len(book), best % len(book)
        sums = sums.gather(1, parent[..., None].expand(-1, -1, group)) + book[code]
        codes = torch.cat((codes.gather(1, parent[..., None].expand(-1, -1, c)), code[..., None]), 2)
    return codes[:, 0]


def _vectors(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Sums of the vectors that codes [out, C] name, [out, 8]."""
    return torch.stack([book[codes[:, c]] for c, book in enumerate(codebooks)]).sum(0)


def _cost(vectors: Tensor, aim: Tensor, gram: Tensor) -> Tensor:
    return ((vectors @ gram - 2 * aim) * vectors).sum(1)
