"""A step through a span that runs cached: transformers' own cache is laid out anew for each level of a tree.

All rows of a level have pasts of equal length, so that they make one batch, and a row's past is its own path, so that
slots are positions: whatever a family does with either (biases, learned positions), it does as in plain decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..model import Span
from .kv_cache import KVCache
from .page_table import BlockTable


def forward(
    span: Span, cache: KVCache, table: BlockTable, rows: Tensor, parents: Sequence[int], blocks: range, extent: int = 0
) -> Tensor:
    """Rows of one step, ids [n] or hidden states [n, d] -> hidden states [n, d].

    Their slots, the last len(rows) pending ones of `table`, receive keys and values.
    """
    base = table.length + table.pending - len(rows)
    dtype = rows.dtype if rows.is_floating_point() else torch.float32
    backend, rows = span.backend, rows.to(span.backend.device)
    result = rows.new_empty(len(rows), span.hidden_size, dtype=backend.stream)
    layers = range(blocks.start - span.start, blocks.stop - span.start)
    for batch, past in _batches(parents, base):
        read = (cache.read(table, at, past) for at in layers)
        seen = [(k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype)) for k, v in read]
        hidden, made = span.forward_cached(rows[batch], seen, blocks, extent)
        for layer, (keys, values) in zip(layers, made, strict=True):
            cache.write(table, layer, base + batch, keys.transpose(1, 2), values.transpose(1, 2))
        result[batch] = hidden.to(backend.stream)
    return result


def _batches(parents: Sequence[int], base: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows [B, n] that can go at once, and the slots of each one's past [B, length], parents first."""
    committed = list(range(base))
    if list(parents) == list(range(-1, len(parents) - 1)):
        yield torch.arange(len(parents))[None], torch.tensor([committed], dtype=torch.long)
        return
    paths: list[list[int]] = []
    for row, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), row])
    for depth in range(1, max(map(len, paths)) + 1):
        level = [path for path in paths if len(path) == depth]
        past = [committed + [base + row for row in path[:-1]] for path in level]
        yield torch.tensor([path[-1:] for path in level]), torch.tensor(past, dtype=torch.long)
