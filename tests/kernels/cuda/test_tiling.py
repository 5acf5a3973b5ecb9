"""Any shape has a tiling that a card can hold, on every kind of card."""

from __future__ import annotations

import pytest
from petal.kernels.cuda import spqr
from petal.kernels.cuda.blobs import LAYOUTS
from petal.kernels.cuda.tiling import Card, Measured, Tiling, candidates, choose, row_tile

KIB = 1024
CARDS = {
    "H100": Card((9, 0), 132, 227 * KIB),
    "A100": Card((8, 0), 108, 163 * KIB),
    "RTX 3090": Card((8, 6), 82, 99 * KIB),
    "RTX 5090": Card((12, 0), 170, 99 * KIB),
}


LISTS = {f"SpQR with {entries}": spqr.layout(entries) for entries in (0, 80, 1008)}


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), *LISTS.values()], ids=[*LAYOUTS, *LISTS])
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_tiling_fits_the_card_and_the_shape(card, layout):
    for outputs, depth_blobs in ((64, 8), (72, 16), (576, 16), (4096, 64), (11008, 64), (8192, 448), (57344, 128)):
        for rows in (1, 8, 9, 33, 64, 65, 128, 129, 512):
            tiling = choose(card, layout, outputs, depth_blobs, rows)
            assert tiling.stages >= tiling.fewest_stages
            assert tiling.resident * (tiling.shared_bytes(layout) + 2 * KIB) <= card.shared + KIB
            assert depth_blobs // 4 % (tiling.depth * tiling.unroll) == 0
            assert tiling.rows == row_tile(rows, card) <= (128 if card.hopper else 64)
            assert tiling.tiles(outputs, rows) * tiling.outputs * tiling.rows >= outputs * rows
            assert card.hopper or not (tiling.wgmma or tiling.registers)


def test_registers_of_a_block_are_those_of_a_multiprocessor():
    for tiling in candidates(CARDS["H100"], LAYOUTS["Int4"], 8192, 128, 128) + candidates(
        CARDS["H100"], LAYOUTS["Int4"], 8192, 128, 64
    ):
        if tiling.registers:
            consumers = tiling.threads - 128
            assert consumers * tiling.registers + 128 * 40 <= 65536 // tiling.threads // 8 * 8 * tiling.threads


def test_a_ring_is_longer_than_what_is_still_read():
    """A stage of one product is let go two products later: two stages would wait for themselves."""
    card, layout = CARDS["H100"], LAYOUTS["Aqlm1x16"]
    short = [t for t in candidates(card, layout, 72, 16, 64) if t.wgmma and t.depth * t.blocks == 1 and t.unroll > 2]
    assert short
    assert all(t.stages >= 3 for t in short)


def test_waves_decide():
    """One tile more than the card holds costs a whole wave."""
    card, measured = CARDS["H100"], Measured(Tiling(8, groups_out=4), 1.0, 100.0)
    one, two = (measured.cost(card, 256 * n, 128, 1) - 1.0 for n in (132, 133))
    assert two == pytest.approx(2 * one)


def test_clusters_have_fewer_places_than_blocks():
    """30 clusters of four are on a card of 132 multiprocessors (NOTES.md), not 33."""
    measured = Measured(Tiling(64, groups_out=2, split=True, cluster=True), 1.0, 100.0)
    thirty, more = (measured.cost(CARDS["H100"], 128 * n, 128, 64) - 1.0 for n in (30, 31))
    assert more == pytest.approx(2 * thirty)
    apart = Measured(Tiling(64, groups_out=2, split=True), 1.0, 100.0)
    assert apart.cost(CARDS["H100"], 128 * 31, 128, 64) == apart.cost(CARDS["H100"], 128 * 30, 128, 64)


def test_few_outputs_are_shared_among_blocks():
    assert choose(CARDS["H100"], LAYOUTS["Int4"], 4096, 224, 64).split
    assert not choose(CARDS["H100"], LAYOUTS["Int4"], 28672, 128, 64).split


def test_a_choice_is_part_of_the_program():
    card, layout = CARDS["H100"], LAYOUTS["Int4"]
    programs = {t.program(card, layout) for t in candidates(card, layout, 8192, 128, 64)}
    assert len(programs) == len(candidates(card, layout, 8192, 128, 64)) > 4
