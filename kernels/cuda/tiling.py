"""How a product is cut for a card: pure planning, by shape alone. Any choice gives the same bits (`src/linear.cu`)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

from .blobs import BLOB, Layout, nf4_levels
from .compile import Program

ROW_TILES = (8, 16, 32, 64, 128)
# Rows that forwards are padded to.
ROWS = (8, 16, 32, 64, 128, 256)
_QUARTERS = 4
_RESERVED = 1024  # bytes of shared memory that the driver keeps for each resident block
_MOST_STAGES = 24
_WITH_CACHE = 96 * 1024  # bytes of shared memory that leave most of the first-level cache
_BARRIERS = 1024  # bytes that they take, with what aligns the ring


@dataclass(frozen=True)
class Card:
    """What planning must know of a card."""

    capability: tuple[int, int]
    multiprocessors: int
    shared: int
    """Bytes of shared memory that a block may have."""

    @property
    def hopper(self) -> bool:
        return self.capability == (9, 0)


@dataclass(frozen=True)
class Tiling:
    """The choices of `linear.cu`, by its names."""

    rows: int
    groups_out: int = 1
    groups_k: int = 1
    blocks: int = 1
    depth: int = 2
    unroll: int = 1
    split: bool = False
    cluster: bool = False
    gated: bool = False
    experts: bool = False
    wide: bool = False
    registers: int = 0
    resident: int = 1
    wgmma: bool = False
    stages: int = 0

    @property
    def outputs(self) -> int:
        """Outputs of a tile."""
        return BLOB * self.groups_out * self.blocks

    @property
    def threads(self) -> int:
        return 128 * self.groups_out * self.groups_k + (128 if self.registers else 32)

    def fitted(self, depth_blobs: int) -> Tiling:
        """With fewer blobs a turn where quarters of `depth_blobs` are no whole turns of the main loop."""
        depth, unroll = self.depth, self.unroll
        while depth_blobs // _QUARTERS % (depth * unroll):
            depth, unroll = (depth, unroll // 2) if unroll > 1 else (depth // 2, 1)
        return replace(self, depth=depth, unroll=unroll)

    def tiles(self, outputs: int, rows: int) -> int:
        places = -(-outputs // self.outputs) * -(-rows // self.rows)
        return places * (_QUARTERS if self.split else 1)

    def partial_bytes(self, outputs: int, rows: int) -> int:
        """Device memory for the sums of quarters, where blocks do not read each other's shared memory."""
        return self.tiles(outputs, rows) * self.outputs * self.rows * 4 if self.split and not self.cluster else 0

    @property
    def fewest_stages(self) -> int:
        """Where a stage is one product, its slot is free two products later, which must not wait for that."""
        return 3 if self.wgmma and self.depth * self.blocks == 1 and self.unroll > 2 else 2

    def stage_bytes(self, layout: Layout) -> int:
        weights = self.groups_out * self.groups_k * self.blocks * layout.bytes
        return self.depth * (weights + self.groups_k * self.rows * 2 * BLOB)

    def fixed_bytes(self, layout: Layout) -> int:
        """Shared memory beside the ring."""
        return layout.table + self.rows * self.outputs * 4

    def shared_bytes(self, layout: Layout) -> int:
        return self.fixed_bytes(layout) + self.stages * self.stage_bytes(layout)

    def on(self, card: Card, layout: Layout) -> Tiling | None:
        """With as many stages as the card holds; None where they are too few."""
        for shared in (min(card.shared, _WITH_CACHE), card.shared)[0 if layout.cached else 1 :]:
            each = (shared + _RESERVED) // self.resident - _RESERVED
            room = each - _BARRIERS - self.fixed_bytes(layout)
            if (stages := min(room // self.stage_bytes(layout), _MOST_STAGES)) >= self.fewest_stages:
                return replace(self, stages=stages)
        return None

    def program(self, card: Card, layout: Layout) -> Program:
        return _program(self, layout.name)


@functools.cache
def _program(tiling: Tiling, format: str) -> Program:
    choices: dict[str, str | int] = {
        "FORMAT": format,
        "TILE_ROWS": tiling.rows,
        "GROUPS_OUT": tiling.groups_out,
        "GROUPS_K": tiling.groups_k,
        "BLOCKS": tiling.blocks,
        "DEPTH": tiling.depth,
        "UNROLL": tiling.unroll,
        "STAGES": tiling.stages,
        "SPLIT": int(tiling.split),
        "CLUSTER": int(tiling.cluster),
        "GATED": int(tiling.gated),
        "EXPERTS": int(tiling.experts),
        "WIDE": int(tiling.wide),
        "REGISTERS": tiling.registers,
        "RESIDENT": tiling.resident,
        "WGMMA": int(tiling.wgmma),
        "NF4_LEVELS": nf4_levels(),
    }
    return Program("linear.cu", tuple(choices.items()))


def row_tile(rows: int, card: Card) -> int:
    """Rows of a tile of activations for so many rows in all."""
    most = ROW_TILES[-1] if card.hopper else 64
    return next((tile for tile in ROW_TILES if tile >= rows), most) if rows <= most else most


@dataclass(frozen=True)
class Measured:
    """A tiling and what it costs: a start, each blob of 64 x 64 weights that a block passes, each tile beside that."""

    tiling: Tiling
    start: float
    """Microseconds."""
    blob: float
    """Nanoseconds."""
    tile: float = 0.0
    """Microseconds, of which tiles side by side share."""

    def cost(self, card: Card, outputs: int, depth_blobs: int, rows: int) -> float:
        """Microseconds of a product: as long as its busiest multiprocessor works."""
        t, at_once = self.tiling, card.multiprocessors
        if t.cluster:  # some multiprocessors have no three neighbours that are free
            at_once = at_once // _QUARTERS * 10 // 11 * _QUARTERS
        waves = -(-t.tiles(outputs, rows) // at_once)
        depth = depth_blobs // (_QUARTERS if t.split else 1)
        passed = waves * depth * t.groups_out * t.blocks * self.blob / 1e3
        return self.start + passed + -(-waves // t.resident) * self.tile


def _hopper(rows: int, start: float, blob: float, out: int, k: int = 1, tile: float = 0.0, **choices: Any) -> Measured:
    return Measured(Tiling(rows, groups_out=out, groups_k=k, wgmma=rows > 16, **choices), start, blob, tile)


# int4 on an H100, eight shapes from 4096² to 28672 x 8192: the lines through the times that choose best (NOTES.md).
_HOPPER = [
    _hopper(8, 0.8, 98, out=1, tile=3.4, split=True, depth=4, resident=5),
    _hopper(8, 0.5, 113, out=1, tile=1.7, split=True, cluster=True, depth=4, resident=5),
    _hopper(8, 1.3, 87, out=1, k=4, depth=4),
    _hopper(8, 0.7, 87, out=2, depth=4, resident=2),
    _hopper(8, 2.6, 93, out=2, tile=2.3, split=True, depth=4, resident=2),
    _hopper(8, 0.6, 88, out=2, k=2),
    _hopper(8, 3.6, 76, out=4),
    _hopper(8, 0.5, 88, out=5, tile=3.4, split=True),
    _hopper(16, 0.5, 95, out=1, tile=3.5, split=True, cluster=True, depth=4, resident=4),
    _hopper(16, 1.6, 100, out=1, k=4, depth=4),
    _hopper(16, 1.2, 100, out=2, depth=4, resident=2),
    _hopper(16, 3.3, 95, out=2, tile=2.4, split=True, depth=4, resident=2),
    _hopper(16, 1.1, 104, out=2, k=2),
    _hopper(16, 2.7, 101, out=4),
    _hopper(16, 0.4, 110, out=5, tile=4.2, split=True),
    _hopper(32, 0.5, 114, out=1, tile=4.1, split=True, cluster=True, unroll=2, resident=4),
    _hopper(32, 2.7, 115, out=1, k=4, unroll=2),
    _hopper(32, 4.6, 136, out=2, unroll=4, resident=2),
    _hopper(32, 4.0, 119, out=2, tile=4.5, split=True, unroll=4, resident=2),
    _hopper(32, 1.7, 116, out=2, k=2, unroll=4),
    _hopper(32, 2.9, 109, out=4, unroll=4),
    _hopper(32, 1.1, 108, out=5, tile=4.9, split=True, unroll=4),
    _hopper(64, 0.5, 157, out=1, tile=4.3, split=True, cluster=True, unroll=2, resident=3),
    _hopper(64, 2.1, 187, out=1, k=4, depth=1, unroll=4),
    _hopper(64, 2.3, 170, out=2, tile=3.9, split=True, unroll=2),
    _hopper(64, 3.3, 140, out=2, tile=7.0, split=True, unroll=4, resident=2),
    _hopper(64, 0.5, 124, out=2, tile=4.7, split=True, cluster=True, unroll=4, resident=2),
    _hopper(64, 6.9, 119, out=2, blocks=2, unroll=4, registers=216),
    _hopper(64, 1.8, 133, out=2, blocks=2, tile=6.6, split=True, unroll=4, registers=216),
    _hopper(64, 0.5, 118, out=3, tile=5.0, split=True, cluster=True, unroll=4),
    _hopper(64, 4.2, 117, out=4, unroll=4),
    _hopper(64, 2.9, 156, out=5, tile=6.3, split=True, unroll=4),
    _hopper(128, 3.6, 234, out=1, k=2, depth=1, unroll=4, registers=216),
    _hopper(128, 3.0, 192, out=2, unroll=2, registers=232),
    _hopper(128, 3.0, 223, out=2, tile=5.0, split=True, unroll=2, registers=216),
    _hopper(128, 4.3, 184, out=3, depth=1, unroll=2, registers=152),
    _hopper(128, 0.5, 215, out=3, tile=5.1, split=True, cluster=True, depth=1, unroll=2, registers=152),
]
# Without Hopper's instructions, guessed from a Hopper card that does not use them: the order counts, not the times.
_PORTABLE = [
    Measured(Tiling(rows, out, k, depth=depth, split=split, resident=resident), start, blob * out * k * rows**0.5)
    for rows in (8, 16, 32, 64)
    for out, k, depth, split, resident, start, blob in (
        (4, 1, 2, False, 1, 3.0, 10.0),
        (2, 1, 1, False, 1, 2.0, 12.0),
        (1, 4, 1, False, 1, 2.0, 11.0),
        (2, 1, 1, True, 1, 4.0, 12.0),
        (1, 1, 1, True, 2, 4.0, 24.0),
        (1, 1, 1, False, 1, 3.0, 14.0),  # for tables that leave little room
    )
]


def candidates(
    card: Card, layout: Layout, outputs: int, depth_blobs: int, rows: int, gated: bool = False
) -> list[Tiling]:
    """Tilings that a product of a shape can use, with their stages, the cheapest first."""
    table = [m for m in (_HOPPER if card.hopper else _PORTABLE) if m.tiling.rows == row_tile(rows, card)]
    found = {}
    for m in table:
        tiling = replace(m.tiling.fitted(depth_blobs), gated=gated).on(card, layout)
        if tiling is not None:
            busy = layout.heavy or gated  # more groups of warps are better than more blobs a group
            slow = (1.15 if busy and tiling.blocks > 1 else 1.0) * (1.1 if tiling.stages < 3 else 1.0)
            if layout.table or layout.cached:  # groups over K take stages of their own from what is looked up
                slow *= 1.0 if tiling.groups_k == 1 else 1.1
            found[tiling] = slow * m.cost(card, outputs, depth_blobs, rows)
    return sorted(found, key=found.__getitem__)


@functools.cache
def choose(card: Card, layout: Layout, outputs: int, depth_blobs: int, rows: int, gated: bool = False) -> Tiling:
    """The tiling of a product of a shape."""
    return candidates(card, layout, outputs, depth_blobs, rows, gated)[0]
