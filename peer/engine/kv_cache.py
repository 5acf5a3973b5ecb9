"""The KV cache of a peer: the bookkeeping of pages over a backend's storage. Only the compute thread touches it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ...kernels.backend import Backend, LayerSpec
from .page_table import PAGE, BlockTable, Copy, PageTable


class KVCache:
    """Keys and values of every layer, preallocated; sessions have block tables. Errors are the page table's."""

    page_table = PageTable

    def __init__(
        self, backend: Backend, layers: Sequence[LayerSpec], tokens: int, dtype: torch.dtype | None = None
    ) -> None:
        """dtype: the first that the backend names, unless told."""
        self.n_pages = -(-tokens // PAGE)
        self.table = self.page_table([spec.window for spec in layers], self.n_pages)
        self.storage = backend.kv_storage(layers, self.n_pages, PAGE, dtype or backend.kv_dtypes[0])
        # By name: a session's cache has one owner, whoever hands tables about.
        self.open, self.fork, self.release = self.table.open, self.table.fork, self.table.release
        self.rewind = self.table.rewind

    @property
    def tokens(self) -> int:
        """How many fit, by whole pages."""
        return self.n_pages * PAGE

    @property
    def free_pages(self) -> int:
        return self.table.free_pages

    def append(self, table: BlockTable, rows: int) -> None:
        """See `PageTable`; shared pages are copied before they are written."""
        if copies := self.table.append(table, rows):
            self._copy(copies)

    def commit(self, table: BlockTable, rows: Sequence[int]) -> None:
        """See `PageTable`; rows are moved, those of all layers of a group at once."""
        copies, moves = self.table.commit(table, rows)
        if copies:
            self._copy(copies)
        for move in moves:
            self.storage.move(self.table.groups[move.group].layers, move.sources, move.targets)

    def check(self, tables: Iterable[BlockTable]) -> None:
        """Integrity of the bookkeeping."""
        self.table.check(tables)

    def read(self, table: BlockTable, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer in any shape of slots, [*slots, kv_heads, width] float32 each."""
        return self.storage.read(layer, self._places(table, layer, slots))

    def write(self, table: BlockTable, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values, as `read` gives them, in pending slots."""
        self.storage.write(layer, self._places(table, layer, slots), keys, values)

    def _places(self, table: BlockTable, layer: int, slots: Tensor) -> Tensor:
        pages = torch.tensor(table.pages[self.table.group_of[layer]], dtype=torch.long, device=slots.device)
        return pages[slots // PAGE] * PAGE + slots % PAGE

    def _copy(self, copies: Iterable[Copy]) -> None:
        for copy in copies:
            self.storage.copy_page(self.table.groups[copy.group].layers, copy.source, copy.target)
