"""Attention of a ragged batch over a paged cache, the same to the bit however rows are batched, cut or stored.

A row's result depends on its query and on the ordered list of keys and values it sees, nothing else: not on other
rows, pages, threads, or whether an ancestor is committed or pending.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..backend import Attend, KVStorage, LayerSpec
from ..metadata import AttentionMetadata
from .library import Library

_CALL = struct.Struct("32q2d")  # call_t of attention.h
_FAULTS = {1: "a visible slot has no page", 2: "parents and positions do not make a tree"}


class CpuKVStorage(KVStorage):
    """Pages of each layer: keys [P, page, Hkv, D], values [P, page, Hkv, Dv], float32 or bfloat16."""

    def __init__(
        self, library: Library, layers: Sequence[LayerSpec], n_pages: int, page_size: int, dtype: torch.dtype
    ) -> None:
        self.layers, self.n_pages, self.page_size = layers, n_pages, page_size
        self._library, self.dtype = library, dtype
        shape = (n_pages, page_size)
        # Zeroed, so that the memory is really there.
        self.keys = [torch.zeros(*shape, s.kv_heads, s.key_width, dtype=dtype) for s in layers]
        self.values = [torch.zeros(*shape, s.kv_heads, s.value_width, dtype=dtype) for s in layers]

    @property
    def page_nbytes(self) -> int:
        """See `KVStorage`."""
        per_row = sum(s.kv_heads * (s.key_width + s.value_width) for s in self.layers)
        return self.page_size * per_row * self.dtype.itemsize

    def attention(self, metadata: Sequence[AttentionMetadata]) -> Attend:
        """See `KVStorage`."""
        for one in metadata:
            if one.prepared is None:
                one.prepared = _prepare(one)
        return _Attention(self, metadata)

    def copy_page(self, layers: Sequence[int], source: int, target: int) -> None:
        """See `KVStorage`."""
        for layer in layers:
            for pages in (self.keys[layer], self.values[layer]):
                pages[target] = pages[source]

    def move(self, layers: Sequence[int], sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `KVStorage`."""
        places = torch.tensor([*sources, *targets], dtype=torch.int64)
        if not len(places):
            return
        if int(places.min()) < 0 or int(places.max()) >= self.n_pages * self.page_size:
            raise IndexError(_FAULTS[1])
        pools = [pool for layer in layers for pool in (self.keys[layer], self.values[layer])]
        addresses = (ctypes.c_void_p * len(pools))(*(pool.data_ptr() for pool in pools))
        sizes = (ctypes.c_int64 * len(pools))(*(pool.stride(1) * pool.element_size() for pool in pools))
        rows, start = len(sources), places.data_ptr()
        if self._library.move_rows(addresses, sizes, len(pools), start, start + 8 * rows, rows):
            raise MemoryError(f"no memory to move {rows} rows")

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


def _prepare(metadata: AttentionMetadata) -> tuple[int, ...]:
    """Addresses and sizes as the native call wants them, and the rows that ask. Raises ValueError."""
    metadata.check()
    m = metadata
    tensors = [m.row_start, m.row_count, m.base, m.positions, m.parents, m.page_table]
    tensors += [] if m.stored is None else [m.stored]
    addresses = [t.data_ptr() for t in tensors] + ([0] if m.stored is None else [])
    return (m.asking, m.page_size, *addresses, len(m.row_start), m.page_table.shape[1], m.page_size)


class _Attention:
    """`Attend` for one forward."""

    def __init__(self, storage: CpuKVStorage, metadata: Sequence[AttentionMetadata]) -> None:
        self._storage, self._prepared = storage, [one.prepared for one in metadata]
        # What is prepared are addresses: the tensors live as long as this does.
        self._metadata = metadata

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
        storage = self._storage
        rows, page_size, *fields = self._prepared[layer]
        k_pages, v_pages = storage.keys[layer], storage.values[layer]
        pages, stored_size, kv_heads, key_width = k_pages.shape
        value_width = v_pages.shape[3]
        heads, dtype = query.shape[1], query.dtype
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"queries are float32 or bfloat16, not {dtype}")
        if page_size != stored_size:
            raise ValueError(f"pages of {stored_size} rows do not fit metadata for {page_size}")
        shapes = ((rows, heads, key_width), (rows, kv_heads, key_width), (rows, kv_heads, value_width))
        query, key, value = _rows((query, key, value), shapes, dtype)
        if heads % kv_heads or (sinks is not None and (sinks.shape != (heads,) or sinks.dtype != torch.float32)):
            raise ValueError(f"{heads} query heads do not fit {kv_heads} kv heads or the sinks")
        sinks = None if sinks is None else sinks.contiguous()
        out = query.new_empty(rows, heads, value_width)
        status = storage._library.attention(
            _CALL.pack(
                query.data_ptr(),
                key.data_ptr(),
                value.data_ptr(),
                out.data_ptr(),
                k_pages.data_ptr(),
                v_pages.data_ptr(),
                0 if sinks is None else sinks.data_ptr(),
                *fields,
                pages,
                heads,
                kv_heads,
                key_width,
                value_width,
                *query.stride()[:2],
                *key.stride()[:2],
                *value.stride()[:2],
                window or 0,
                dtype == torch.bfloat16,
                storage.dtype == torch.bfloat16,
                storage._library.threads,
                scale,
                softcap or 0.0,
            )
        )
        if status == 3:
            raise MemoryError(f"no memory for the attention of {rows} rows")
        if status:
            raise (IndexError if status == 1 else ValueError)(_FAULTS[status])
        return out


def _rows(given: tuple[Tensor, ...], shapes: tuple[tuple[int, int, int], ...], dtype: torch.dtype) -> list[Tensor]:
    """Tensors as the kernel reads them, with values side by side."""
    result = []
    for x, shape in zip(given, shapes, strict=True):
        if x.shape != shape or x.dtype != dtype or not x.is_cpu:
            raise ValueError(f"{tuple(x.shape)} {x.dtype} given, expected {shape} {dtype} on the CPU")
        result.append(x if x.stride(2) == 1 else x.contiguous())
    return result
