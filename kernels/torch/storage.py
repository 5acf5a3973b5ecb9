"""Keys and values as torch tensors on any device, attention row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..backend import Attend, KVStorage, LayerSpec
from ..metadata import AttentionMetadata


class TorchKVStorage(KVStorage):
    """Pages of each layer: keys [P, page, Hkv, D], values [P, page, Hkv, Dv]."""

    def __init__(
        self, device: torch.device, layers: Sequence[LayerSpec], n_pages: int, page_size: int, dtype: torch.dtype
    ) -> None:
        self.layers, self.n_pages, self.page_size, self.dtype = layers, n_pages, page_size, dtype
        shape = (n_pages, page_size)
        self.keys = [torch.zeros(*shape, s.kv_heads, s.key_width, dtype=dtype, device=device) for s in layers]
        self.values = [torch.zeros(*shape, s.kv_heads, s.value_width, dtype=dtype, device=device) for s in layers]

    @property
    def page_nbytes(self) -> int:
        """See `KVStorage`."""
        return sum(t[:1].nbytes for t in [*self.keys, *self.values])

    def attention(self, metadata: Sequence[AttentionMetadata]) -> Attend:
        """See `KVStorage`."""
        for one in metadata:
            one.check()

        def attend(
            layer: int,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            *,
            scale: float,
            window: int | None = None,
            softcap: float | None = None,
            sinks: Tensor | None = None,
        ) -> Tensor:
            k_pages, v_pages, at = self.keys[layer], self.values[layer], metadata[layer]
            ops.write(key, value, k_pages, v_pages, at)
            return ops.attend(query, k_pages, v_pages, at, scale=scale, window=window, softcap=softcap, sinks=sinks)

        return attend

    def copy_page(self, layers: Sequence[int], source: int, target: int) -> None:
        """See `KVStorage`."""
        for layer in layers:
            for pages in (self.keys[layer], self.values[layer]):
                pages[target] = pages[source]

    def move(self, layers: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `KVStorage`."""
        if not len(sources):
            return
        if min(*sources, *targets) < 0:
            raise IndexError("a slot has no page")
        at = torch.tensor([sources, targets], device=self.keys[0].device)
        for layer in layers:
            for pages in (self.keys[layer], self.values[layer]):
                rows = pages.flatten(0, 1)
                rows[at[1]] = rows[at[0]]

    def read(self, layer: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVStorage`."""
        return self.keys[layer].flatten(0, 1)[places].float(), self.values[layer].flatten(0, 1)[places].float()

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `KVStorage`."""
        self.keys[layer].flatten(0, 1)[places] = keys.to(self.dtype)
        self.values[layer].flatten(0, 1)[places] = values.to(self.dtype)

    def grow(self, n_pages: int) -> None:
        """See `KVStorage`."""
        for pools in (self.keys, self.values):
            pools[:] = [torch.cat((p, p.new_zeros(n_pages - self.n_pages, *p.shape[1:]))) for p in pools]
        self.n_pages = n_pages
