"""Keys and values of a span's layers on a card, in bfloat16."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..backend import KVStorage, LayerSpec
from ..metadata import AttentionMetadata
from .attention import Attention, Extent, Queries
from .elementwise import Elementwise


@dataclass
class Prepared:
    """What layers of one forward share: the extent, and the plan by query heads on a kv head."""

    extent: Extent
    plans: dict[int, Queries] = field(default_factory=dict)


def prepare(metadata: AttentionMetadata) -> Prepared:
    """For metadata that brings no extent: it is read back from the device, which waits for it."""
    counts, bases = metadata.row_count.tolist(), metadata.base.tolist()
    stored = [0] * len(counts) if metadata.stored is None else metadata.stored.tolist()
    asking = [count - skipped for count, skipped in zip(counts, stored, strict=True)]
    longest = max((base + count for base, count in zip(bases, counts, strict=True)), default=0)
    return Prepared(Extent(sum(asking), len(counts), longest, max(counts, default=1), max(asking, default=1)))


class CudaKVStorage(KVStorage):
    """Layers of one shape lie in one tensor: keys [layers, P, page, Hkv, D], values [layers, P, page, Hkv, Dv]."""

    def __init__(
        self,
        attention: Attention,
        small: Elementwise,
        device: torch.device,
        layers: Sequence[LayerSpec],
        n_pages: int,
        page_size: int,
    ) -> None:
        self.layers, self.n_pages, self.page_size = layers, n_pages, page_size
        self.kernels, self.small, self.device = attention, small, device
        kinds = {(s.kv_heads, s.key_width, s.value_width): 0 for s in layers}
        self._place: list[tuple[tuple[int, int, int], int]] = []
        for s in layers:
            kind = (s.kv_heads, s.key_width, s.value_width)
            self._place.append((kind, kinds[kind]))
            kinds[kind] += 1
        self._chosen: dict[tuple[int, ...], list[tuple[tuple[int, int, int], Tensor]]] = {}
        self._pools = {kind: self._made(kind, count, n_pages) for kind, count in kinds.items()}

    @property
    def page_nbytes(self) -> int:
        """See `KVStorage`."""
        return sum(t[:, :1].nbytes for pair in self._pools.values() for t in pair)

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer: [P, page, Hkv, width]."""
        kind, index = self._place[layer]
        keys, values = self._pools[kind]
        return keys[index], values[index]

    def attention(self, metadata: Sequence[AttentionMetadata]) -> CudaAttend:
        """See `KVStorage`. A slot without a page is left out: what does not fit touches nothing else."""
        for one in metadata:
            if one.prepared is None:
                one.check()
                one.prepared = prepare(one)

        return CudaAttend(self, metadata)

    def copy_page(self, layers: Sequence[int], source: int, target: int) -> None:
        """See `KVStorage`."""
        for kind, which in self._by_kind(layers):
            for pool in self._pools[kind]:
                pool[which, target] = pool[which, source]

    def move(self, layers: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `KVStorage`: one gather and one scatter for all layers of a kind."""
        if not len(sources):
            return
        places = [*sources, *targets]
        if min(places) < 0 or max(places) >= self.n_pages * self.page_size:
            raise IndexError("a slot has no page")
        at = torch.tensor([list(sources), list(targets)], pin_memory=True).to(self.device, non_blocking=True)
        for kind, which in self._by_kind(layers):
            for pool in self._pools[kind]:
                rows = pool.flatten(1, 2)
                rows[which[:, None], at[1]] = rows[which[:, None], at[0]]

    def read(self, layer: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVStorage`."""
        keys, values = (pages.flatten(0, 1)[places.to(self.device)].float() for pages in self.pages(layer))
        return keys, values

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """See `KVStorage`."""
        for pages, rows in zip(self.pages(layer), (keys, values), strict=True):
            pages.flatten(0, 1)[places.to(self.device)] = rows.to(self.device, torch.bfloat16)

    def grow(self, n_pages: int) -> None:
        """See `KVStorage`. Graphs that were captured before must be captured anew."""
        for kind, pair in self._pools.items():
            wider = self._made(kind, len(pair[0]), n_pages)
            for new, old in zip(wider, pair, strict=True):
                new[:, : self.n_pages] = old
            self._pools[kind] = wider
        self.n_pages = n_pages

    def _made(self, kind: tuple[int, int, int], count: int, n_pages: int) -> tuple[Tensor, Tensor]:
        kv_heads, key_width, value_width = kind
        if kv_heads * key_width % 8 or kv_heads * value_width % 8:
            raise ValueError(f"heads of {key_width} and {value_width} values on {kv_heads} do not fill 16 bytes")
        try:
            keys, values = (
                torch.zeros(count, n_pages, self.page_size, kv_heads, width, dtype=torch.bfloat16, device=self.device)
                for width in (key_width, value_width)
            )
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"the card has no room for {n_pages} pages of {count} layers") from error
        return keys, values

    def _by_kind(self, layers: Sequence[int]) -> list[tuple[tuple[int, int, int], Tensor]]:
        """Layers of each kind, on the device; those of a group are asked for again and again."""
        if (asked := tuple(layers)) not in self._chosen:
            self._chosen[asked] = self._sorted(layers)
        return self._chosen[asked]

    def _sorted(self, layers: Sequence[int]) -> list[tuple[tuple[int, int, int], Tensor]]:
        found: dict[tuple[int, int, int], list[int]] = {}
        for layer in layers:
            kind, index = self._place[layer]
            found.setdefault(kind, []).append(index)
        return [(kind, torch.tensor(which, device=self.device)) for kind, which in found.items()]


class CudaAttend:
    """One forward's attention: see `Attend`; blocks that are computed whole ask for its parts."""

    def __init__(self, storage: CudaKVStorage, metadata: Sequence[AttentionMetadata]) -> None:
        self._storage, self._metadata = storage, metadata

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values: [P, page, Hkv, width]."""
        return self._storage.pages(layer)

    def window(self, layer: int) -> int | None:
        return self._storage.layers[layer].window

    def queries(self, layer: int, heads: int) -> Queries:
        """The plan for so many query heads on a kv head; groups of layers share it but for the page table."""
        m = self._metadata[layer]
        prepared: Prepared = m.prepared
        if heads not in prepared.plans:
            prepared.plans[heads] = self._storage.kernels.plan(
                prepared.extent, heads, m.row_start, m.row_count, m.base, m.positions, m.parents, m.page_table, m.stored
            )
        plan = prepared.plans[heads]
        return plan if plan.table is m.page_table else replace(plan, table=m.page_table)

    def __call__(
        self,
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
        pages = self.pages(layer)
        q, k, v = (self._rows(x, name) for name, x in (("query", query), ("key", key), ("value", value)))
        if q.shape[1] % k.shape[1] or k.shape[1:] != pages[0].shape[2:] or v.shape[1:] != pages[1].shape[2:]:
            raise ValueError(f"heads {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)} do not fit the cache")
        queries = self.queries(layer, q.shape[1] // k.shape[1])
        if len(q) != queries.extent.queries:
            raise ValueError(f"{len(q)} rows ask, {queries.extent.queries} were planned")
        self._storage.small.store(k, v, *pages, queries)
        out = torch.empty(*q.shape[:2], v.shape[2], dtype=torch.bfloat16, device=q.device)
        sinks = None if sinks is None else sinks.float().contiguous()
        self._storage.kernels.attend(q, *pages, queries, out, scale=scale, window=window, softcap=softcap, sinks=sinks)
        return out.to(query.dtype)

    def _rows(self, x: Tensor, name: str) -> Tensor:
        if x.dim() != 3 or x.device.type != self._storage.device.type:
            raise ValueError(
                f"a {name} of {tuple(x.shape)} on {x.device}: [rows, heads, width] on {self._storage.device} is needed"
            )
        return x.to(torch.bfloat16).contiguous()
