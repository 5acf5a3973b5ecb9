"""Attention over pages on a card: right against float64, one bit pattern a row however it is batched, cut or stored."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys

import pytest
import torch
from petal.kernels.cuda.attention import Attention, Extent, Queries
from petal.kernels.cuda.elementwise import Elementwise
from petal.kernels.cuda.runtime import runtime
from petal.kernels.reference import attention
from torch import Tensor

from tests.kernels.batches import Batch, batch_of, chain, tree
from tests.kernels.cuda.planned import extent_of, plan_rows

CARD = pytest.mark.cuda
Segments = list[tuple[int, list[int]]]


def interpretable() -> bool:
    """Triton is here, with a numpy that its interpreter can work with."""
    import numpy

    return importlib.util.find_spec("triton") is not None and tuple(map(int, numpy.__version__.split(".")[:2])) < (2, 4)


@pytest.mark.skipif(not interpretable(), reason="Triton's interpreter needs Triton and numpy below 2.4")
def test_attention_is_right_without_a_card():
    command = [sys.executable, "-m", "tests.kernels.cuda.interpreted"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_plan_of_a_tree_by_hand():
    """Rows 0 - 1 - 2 in a chain, 3 below 0, 4 below 3: paths begin where the chain ends."""
    table = torch.arange(10, dtype=torch.int32)[None]
    plan = plan_rows(extent_of([5], [100], []), 2, [5], [100], [-1, 0, 1, 0, 3], table)
    assert plan.position_of.tolist() == [100, 101, 102, 101, 102]
    assert plan.straight_of.tolist() == [101, 102, 103, 101, 101]
    assert plan.path[3, 0] == 103
    assert plan.path[4, :2].tolist() == [103, 104]
    assert plan.full_of.tolist() == [64] * 5


@pytest.mark.parametrize("counts", [[1], [1] * 16, [64], [3, 1, 60], [256]], ids=str)
def test_grids_hold_every_query(counts):
    extent = extent_of(counts, [0] * len(counts), [])
    for heads in (1, 2, 4, 5, 8, 16):
        group = extent.group(heads)
        assert sum(-(-n // group) for n in counts) <= extent.groups(heads)
        assert group * heads >= 16 or group * heads * 2 > 16


@pytest.fixture(scope="module")
def card() -> tuple[Attention, Elementwise]:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    made = runtime(torch.device("cuda", 0))
    return Attention(made), Elementwise(made)


def planned(card: tuple[Attention, Elementwise], batch: Batch, extent: Extent | None = None) -> Queries:
    plan = batch.metadata
    counts, bases, parents = (t.tolist() for t in (plan.row_count, plan.base, plan.parents))
    parts = [t.cuda() for t in (plan.row_start, plan.row_count, plan.base, plan.positions, plan.parents)]
    heads = batch.q.shape[1] // batch.k.shape[1]
    return card[0].plan(extent or extent_of(counts, bases, parents), heads, *parts, plan.page_table.cuda())


def attended(card: tuple[Attention, Elementwise], batch: Batch, queries: Queries | None = None, **options) -> Tensor:
    """Stores and attends; the pages stay on the host."""
    queries = queries or planned(card, batch)
    k_pages, v_pages = batch.k_pages.cuda().nan_to_num(7.0), batch.v_pages.cuda().nan_to_num(7.0)
    card[1].store(batch.k.cuda(), batch.v.cuda(), k_pages, v_pages, queries)
    out = torch.full((*batch.q.shape[:2], batch.v.shape[2]), torch.nan, dtype=torch.bfloat16, device="cuda")
    return card[0].attend(batch.q.cuda(), k_pages, v_pages, queries, out, scale=0.11, **options)


def expected(batch: Batch, **options) -> Tensor:
    plan = batch.metadata
    filled = batch.with_pages()
    for segment, rows, asking in plan.segments():
        base = int(plan.base[segment])
        places = plan.places(segment, torch.arange(base, base + rows.stop - rows.start))
        filled.k_pages.flatten(0, 1)[places] = batch.k[asking]
        filled.v_pages.flatten(0, 1)[places] = batch.v[asking]
    return attention(filled.q, filled.k_pages, filled.v_pages, plan, scale=0.11, **options)


BATCHES: dict[str, Segments] = {
    "one row": [(1000, [-1])],
    "nothing before": [(0, chain(70))],
    "tree": [(1021, tree(64))],
    "prefill, later chunk": [(500, chain(300))],
    "sessions": [(70, tree(9)), (0, chain(5)), (2300, [-1]), (64, chain(2)), (1, tree(33, 3))],
    "single rows": [(97 * i, [-1]) for i in range(20)],
}
HEADS = {"8 of 8": (16, 2), "3 of 1": (9, 3), "alone": (4, 4), "5 of 1": (10, 2), "16 of 1": (16, 1)}


@CARD
@pytest.mark.parametrize("name", BATCHES)
def test_a_plan_is_what_python_makes_of_it(card, name):
    batch = batch_of(BATCHES[name], (8, 2), (64, 64), torch.bfloat16)
    counts, bases, parents = (
        t.tolist() for t in (batch.metadata.row_count, batch.metadata.base, batch.metadata.parents)
    )
    ours = plan_rows(extent_of(counts, bases, parents), 4, counts, bases, parents, batch.metadata.page_table)
    theirs = planned(card, batch)
    for field in ("segment_of", "position_of", "slot_of", "straight_of", "full_of"):
        assert getattr(theirs, field).tolist() == getattr(ours, field).tolist(), field
    for q in range(len(ours.path)):
        length = int(ours.position_of[q]) + 1 - int(ours.straight_of[q])
        assert theirs.path[q, :length].tolist() == ours.path[q, :length].tolist()
    used = int((ours.groups[:, 0] > 0).sum())
    assert theirs.groups[:used].tolist() == ours.groups[:used].tolist()
    assert not theirs.groups[used:, 0].any()


@CARD
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", BATCHES)
def test_attention_is_right(card, name, heads):
    batch = batch_of(BATCHES[name], HEADS[heads], (128, 128), torch.bfloat16)
    reference = expected(batch)
    error = float((attended(card, batch).cpu().double() - reference).norm() / reference.norm())
    assert error < 6e-3


@CARD
@pytest.mark.parametrize("widths", [(64, 64), (80, 80), (96, 96), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"window": 100}, {"window": 1000}, {"softcap": 5.0}, {"sinks": True, "window": 64}], ids=str
)
def test_widths_and_options(card, widths, options):
    batch = batch_of([(1100, tree(20)), (30, chain(90)), (200, [-1])], (8, 2), widths, torch.bfloat16)
    if "sinks" in options:
        options = {**options, "sinks": torch.linspace(-1, 3, 8)}
    reference = expected(batch, **options)
    on_card = {name: v.cuda() if isinstance(v, Tensor) else v for name, v in options.items()}
    error = float((attended(card, batch, **on_card).cpu().double() - reference).norm() / reference.norm())
    assert error < 8e-3


def alone(batch: Batch, row: int) -> Batch:
    """The same row with its ancestors committed, in a batch of its own with other pages."""
    parents, base = batch.metadata.parents.tolist(), int(batch.metadata.base[0])
    way = [row]
    while parents[way[-1]] >= 0:
        way.append(parents[way[-1]])
    way.reverse()
    one = batch_of(
        [(base + len(way) - 1, [-1])],
        batch.q.shape[1:2] + batch.k.shape[1:2],
        batch.k.shape[2:] + batch.v.shape[2:],
        torch.bfloat16,
    )
    old, new = batch.metadata, one.metadata
    before = torch.arange(base)
    later = new.places(0, torch.arange(base, base + len(way) - 1))
    for pages, other, rows in ((batch.k_pages, one.k_pages, batch.k), (batch.v_pages, one.v_pages, batch.v)):
        other.flatten(0, 1)[new.places(0, before)] = pages.flatten(0, 1)[old.places(0, before)]
        other.flatten(0, 1)[later] = rows[torch.tensor(way[:-1], dtype=torch.long)]
    return Batch(batch.q[row : row + 1], batch.k[row : row + 1], batch.v[row : row + 1], one.k_pages, one.v_pages, new)


@CARD
@pytest.mark.parametrize("options", [{}, {"window": 150}, {"softcap": 5.0}], ids=str)
@pytest.mark.parametrize("base", [0, 60, 1021, 3000])
@pytest.mark.parametrize("heads", ["8 of 8", "3 of 1"])
def test_a_row_in_a_tree_is_the_same_row_alone(card, heads, base, options):
    batch = batch_of([(base, tree(64))], HEADS[heads], (128, 128), torch.bfloat16)
    together = attended(card, batch, **options)
    for row in random.Random(base).sample(range(64), 6):
        assert torch.equal(attended(card, alone(batch, row), **options)[0], together[row]), row


@CARD
def test_who_folds_makes_no_difference(card):
    """Chunks folded early or late, and grids made for longer contexts."""
    batch = batch_of([(2500, tree(64)), (1100, chain(80))], (16, 2), (128, 128), torch.bfloat16)
    first = attended(card, batch)
    plan = batch.metadata
    extent = extent_of(plan.row_count.tolist(), plan.base.tolist(), [])
    longer = Extent(extent.queries, extent.segments, 40_000, extent.deepest, extent.widest)
    assert longer.supers(8, 2) != extent.supers(8, 2)
    assert torch.equal(attended(card, batch, planned(card, batch, longer)), first)


@CARD
def test_padding_writes_nowhere(card):
    batch = batch_of([(100, tree(5))], (8, 2), (64, 64), torch.bfloat16)
    plan = batch.metadata
    exact = extent_of([5], [100], [])
    wide = Extent(16, 3, exact.longest, 5, 5)
    counts, starts = torch.tensor([5, 0, 0]), torch.tensor([0, 5, 5])
    parts = [t.int().cuda() for t in (starts, counts, torch.tensor([100, 0, 0]))]
    padded = [torch.nn.functional.pad(t, (0, 11)).cuda() for t in (plan.positions, plan.parents)]
    table = torch.cat((plan.page_table, torch.full_like(plan.page_table, -1).repeat(2, 1))).cuda()
    queries = card[0].plan(wide, 4, *parts, *padded, table)
    assert queries.segment_of.tolist() == [0] * 5 + [-1] * 11
    grown = [torch.cat((t, t.new_zeros(11, *t.shape[1:]))) for t in (batch.q, batch.k, batch.v)]
    out = attended(card, Batch(*grown, batch.k_pages, batch.v_pages, plan), queries)
    assert torch.equal(out[:5], attended(card, batch))
    assert out[5:].isnan().all()


@CARD
def test_norms_rotations_and_gates_are_right(card):
    small = card[1]
    x, add = (torch.randn(37, 576, device="cuda").bfloat16() for _ in range(2))
    weight = torch.rand(576, device="cuda") + 0.5
    h = x.clone()
    y = small.norm(h, weight, 1e-5, torch.empty_like(x), add=add)
    both = (x.float() + add.float()).bfloat16()
    assert torch.equal(h, both)
    reference = weight.double() * both.double() * torch.rsqrt(both.double().pow(2).mean(1, keepdim=True) + 1e-5)
    assert float((y.double() - reference).abs().max() / reference.abs().max()) < 4e-3
    assert torch.equal(small.norm(h[5:6].clone(), weight, 1e-5, torch.empty_like(x[:1])), y[5:6])

    heads = torch.randn(37, 6, 64, device="cuda").bfloat16()
    angles = torch.rand(37, 32, device="cuda").repeat(1, 2) * 6
    left, right = heads.double().chunk(2, -1)
    turned = heads.double() * angles.cos()[:, None] + torch.cat((-right, left), -1) * angles.sin()[:, None]
    got = small.rotate(heads.clone(), angles.cos(), angles.sin())
    assert float((got.double() - turned).norm() / turned.norm()) < 4e-3

    gate, up = (torch.randn(37, 1536, device="cuda").bfloat16() for _ in range(2))
    product = torch.nn.functional.silu(gate.double()) * up.double()
    assert float((small.gate(gate, up).double() - product).norm() / product.norm()) < 6e-3
    assert torch.equal(small.add(x.clone(), add), both)
