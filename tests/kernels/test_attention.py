from dataclasses import replace
from typing import Any

import pytest
import torch
from petal.kernels import ops, reference
from petal.kernels.backend import LayerSpec
from petal.kernels.cpu.library import kernels
from petal.kernels.metadata import AttentionMetadata, BatchPlan
from petal.kernels.registry import backend_for
from torch import Tensor

from tests.kernels.batches import Batch, batch_of, chain, metadata_of, tree

MIXED = [(0, chain(50)), (77, tree(40)), (200, [-1]), (33, chain(7)), (64, tree(5)), (5, [-1, -1, 0, 1])]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 20},
    "window-1": {"window": 1},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 3.0, 0.0, 2.0, 1.0])},
    "all": {"window": 37, "softcap": 5.0, "sinks": torch.ones(6)},
}


def storage_of(k_pages: Tensor, v_pages: Tensor) -> Any:
    """A layer's storage that lies on these pages."""
    spec = LayerSpec(k_pages.shape[2], k_pages.shape[3], v_pages.shape[3], None)
    storage: Any = backend_for().kv_storage([spec], *k_pages.shape[:2], k_pages.dtype)
    storage.keys, storage.values = [k_pages], [v_pages]
    return storage


def attend(
    q: Tensor, k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, metadata: AttentionMetadata, **options
) -> Tensor:
    return storage_of(k_pages, v_pages).attention([metadata])(0, q, k, v, **options)


def _run(batch: Batch, **options) -> Tensor:
    b = batch.with_pages()
    return attend(b.q, b.k, b.v, b.k_pages, b.v_pages, b.metadata, scale=0.2, **options)


def _reference(batch: Batch, **options) -> Tensor:
    b = batch.with_pages()
    ops.write(b.k, b.v, b.k_pages, b.v_pages, b.metadata)
    return reference.attention(b.q, b.k_pages, b.v_pages, b.metadata, scale=0.2, **options)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("name", OPTIONS)
def test_close_to_float64(name: str):
    batch = batch_of(MIXED)
    torch.testing.assert_close(
        _run(batch, **OPTIONS[name]).double(), _reference(batch, **OPTIONS[name]), atol=2e-6, rtol=0
    )


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("heads", [(2, 2), (9, 3), (8, 1), (40, 2)])
@pytest.mark.parametrize("widths", [(64, 64), (16, 24), (37, 51), (192, 128), (576, 512)])
def test_heads_and_widths(heads: tuple[int, int], widths: tuple[int, int]):
    batch = batch_of([(40, tree(9)), (0, chain(3))], heads, widths, page_size=7)
    torch.testing.assert_close(_run(batch).double(), _reference(batch), atol=3e-5, rtol=0)


@pytest.mark.usefixtures("code")
def test_bfloat16():
    batch = batch_of(MIXED, dtype=torch.bfloat16)
    result = _run(batch)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), _reference(batch), atol=1e-2, rtol=1e-2)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 64, 255, 512])
def test_prefill_in_any_chunks(rows: int, code: str):
    """One pass over a prompt, and the same prompt cut anywhere: equal bits."""
    if code == "torch":
        rows = min(rows, 64)  # it works row by row
    for options in (OPTIONS["plain"], OPTIONS["all"]):
        batch = batch_of([(0, chain(rows))])
        whole = _run(batch, **options)
        for cut in {1, 3, 31, 32, 33, 100} if rows <= 64 else {33, 100}:
            b = batch.with_pages()
            parts = []
            for start in range(0, rows, cut):
                count = min(cut, rows - start)
                metadata = _part(batch, start, count)
                at = slice(start, start + count)
                parts.append(attend(b.q[at], b.k[at], b.v[at], b.k_pages, b.v_pages, metadata, scale=0.2, **options))
            assert torch.equal(torch.cat(parts), whole)


def _part(batch: Batch, start: int, count: int):
    """Rows [start, start + count) of a single chain as a step of its own."""
    return replace(
        batch.metadata,
        row_count=torch.tensor([count], dtype=torch.int32),
        base=torch.tensor([start], dtype=torch.int32),
        positions=batch.metadata.positions[start : start + count].contiguous(),
        parents=torch.arange(-1, count - 1, dtype=torch.int32),
    )


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_does_not_depend_on_the_batch(name: str, dtype: torch.dtype):
    batch = batch_of(MIXED, dtype=dtype)
    whole = _run(batch, **OPTIONS[name])
    for index, rows, _ in batch.metadata.segments():
        metadata = replace(
            batch.metadata,
            row_start=torch.tensor([0], dtype=torch.int32),
            row_count=batch.metadata.row_count[index : index + 1].clone(),
            base=batch.metadata.base[index : index + 1].clone(),
            positions=batch.metadata.positions[rows].clone(),
            parents=batch.metadata.parents[rows].clone(),
            page_table=batch.metadata.page_table[index : index + 1].clone(),
        )
        one = replace(batch, q=batch.q[rows], k=batch.k[rows], v=batch.v[rows], metadata=metadata)
        assert torch.equal(_run(one, **OPTIONS[name]), whole[rows])


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("name", ["plain", "all"])
def test_trees_grow_in_several_forwards(name: str):
    """Rows that ask later, behind those that are stored, get the bits of a forward of all."""
    batch = batch_of(MIXED)
    whole, b = _run(batch, **OPTIONS[name]), batch.with_pages()
    counts, starts = batch.metadata.row_count, batch.metadata.row_start.tolist()
    done = torch.zeros_like(counts)
    for upto in (counts // 3, counts // 2, counts):
        kept = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, upto.tolist(), strict=True)])
        rows = torch.cat(
            [torch.arange(s + d, s + n) for s, d, n in zip(starts, done.tolist(), upto.tolist(), strict=True)]
        )
        metadata = replace(
            batch.metadata,
            row_start=(upto.cumsum(0) - upto).int(),
            row_count=upto,
            positions=batch.metadata.positions[kept],
            parents=batch.metadata.parents[kept],
            stored=done,
        )
        part = attend(b.q[rows], b.k[rows], b.v[rows], b.k_pages, b.v_pages, metadata, scale=0.2, **OPTIONS[name])
        assert torch.equal(part, whole[rows])
        done = upto


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("base", [0, 31, 70])
def test_tree_row_equals_its_path_committed(name: str, base: int):
    """Every row of a tree, against the same path fed token by token."""
    parents = tree(24, seed=3)
    batch = batch_of([(base, parents)])
    whole = _run(batch, **OPTIONS[name])
    for row in (0, 5, 17, 23):
        path = [row]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        b = batch.with_pages()
        for depth, u in enumerate(path):
            metadata, at = _part(batch, 0, 1), slice(u, u + 1)
            position = torch.tensor([base + depth], dtype=torch.int32)
            metadata = replace(metadata, base=position, positions=position)
            step = attend(b.q[at], b.k[at], b.v[at], b.k_pages, b.v_pages, metadata, scale=0.2, **OPTIONS[name])
        assert torch.equal(step[0], whole[row])


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("page_size", [1, 7, 32, 64])
def test_pages_are_invisible(page_size: int):
    segments = [(45, tree(20)), (40, chain(9))]
    batch = batch_of(segments)
    metadata, pages = metadata_of(segments, page_size, seed=9)
    k_pages = torch.full((pages, page_size, *batch.k_pages.shape[2:]), torch.nan)
    v_pages = torch.full((pages, page_size, *batch.v_pages.shape[2:]), torch.nan)
    for index, (base, _) in enumerate(segments):
        old, new = (p.places(index, torch.arange(base)) for p in (batch.metadata, metadata))
        k_pages.flatten(0, 1)[new] = batch.k_pages.flatten(0, 1)[old]
        v_pages.flatten(0, 1)[new] = batch.v_pages.flatten(0, 1)[old]
    assert torch.equal(_run(replace(batch, metadata=metadata, k_pages=k_pages, v_pages=v_pages)), _run(batch))


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("options", [{}, {"window": 37}])
def test_poison_stays_in_its_row(options: dict):
    """NaN or infinity in a row reaches its descendants only. Unused slots of every batch here are NaN already."""
    for parents in (tree(20), chain(20)):
        batch = batch_of([(50, parents)])
        clean = _run(batch, **options)
        batch.v[4] = torch.inf
        batch.k[4] = torch.nan
        dirty = _run(batch, **options)
        below = [4]
        for row in range(5, 20):
            if parents[row] in below:
                below.append(row)
        keep = torch.tensor([row not in below for row in range(20)])
        assert torch.equal(dirty[keep], clean[keep])
        assert dirty[~keep].isnan().all()


@pytest.mark.usefixtures("code")
def test_pages_below_the_window_may_be_dropped():
    batch = batch_of([(100, tree(6)), (90, chain(3))])
    whole = _run(batch, window=16)
    dropped = batch.metadata.page_table.clone()
    dropped[:, :4] = -1
    assert torch.equal(_run(replace(batch, metadata=replace(batch.metadata, page_table=dropped)), window=16), whole)


def test_threads_do_not_matter():
    if kernels() is None:
        pytest.skip("no C compiler")
    threads, results = torch.get_num_threads(), []
    batch = batch_of([*MIXED, (300, chain(40))])
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(_run(batch))
    torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.usefixtures("code")
def test_strided_rows():
    batch = batch_of(MIXED)
    whole = _run(batch)
    by_head = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (batch.q, batch.k, batch.v)]
    by_width = [x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for x in (batch.q, batch.k, batch.v)]
    for q, k, v in (by_head, by_width):
        b = batch.with_pages()
        assert torch.equal(attend(q, k, v, b.k_pages, b.v_pages, b.metadata, scale=0.2), whole)


@pytest.mark.usefixtures("code")
def test_commit_moves_the_path_down():
    parents = tree(20, seed=3)
    batch = batch_of([(45, parents)]).with_pages()
    ops.write(batch.k, batch.v, batch.k_pages, batch.v_pages, batch.metadata)
    path = [19]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    source = batch.metadata.places(0, torch.tensor([45 + u for u in path]))
    target = batch.metadata.places(0, torch.arange(45, 45 + len(path)))
    for dtype in (torch.float32, torch.bfloat16):
        storage: Any = storage_of(batch.k_pages.to(dtype, copy=True), batch.v_pages.to(dtype, copy=True))
        pools = [pages.flatten(0, 1) for pages in (*storage.keys, *storage.values)]
        before = [pool[source] for pool in pools]
        committed = [pool[batch.metadata.places(0, torch.arange(45))] for pool in pools]
        storage.move([0], source.tolist(), target.tolist())
        for pool, rows, old in zip(pools, before, committed, strict=True):
            assert torch.equal(pool[target], rows)
            assert torch.equal(pool[batch.metadata.places(0, torch.arange(45))], old)
        for wrong in (-1, 10**6):
            with pytest.raises(IndexError):
                storage.move([0], [wrong], [0])


@pytest.mark.usefixtures("code")
def test_rows_are_moved_as_if_all_were_read_first():
    storage: Any = storage_of(torch.arange(8.0).view(2, 4, 1, 1), torch.arange(8.0).view(2, 4, 1, 1) + 100)
    storage.move([0], [1, 0, 7], [0, 1, 4])
    for pages, first in ((storage.keys[0], 0), (storage.values[0], 100)):
        assert (pages.flatten() - first).tolist() == [1, 0, 2, 3, 7, 5, 6, 7]


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("name", OPTIONS)
def test_a_cache_in_bfloat16_rounds_keys_and_values_and_nothing_else(name: str):
    batch = batch_of(MIXED)
    k, v = (x.bfloat16().float() for x in (batch.k, batch.v))
    k_pages, v_pages = batch.k_pages.bfloat16(), batch.v_pages.bfloat16()
    rounded = replace(batch, k=k, v=v, k_pages=k_pages.float(), v_pages=v_pages.float())
    half = _run(replace(batch, k_pages=k_pages, v_pages=v_pages), **OPTIONS[name])
    assert half.dtype == torch.float32
    assert torch.equal(half, _run(rounded, **OPTIONS[name]))
    assert not torch.equal(half, _run(batch, **OPTIONS[name]))  # negative control


@pytest.mark.usefixtures("code")
def test_a_storage_grows_and_copies_pages():
    storage: Any = storage_of(*(torch.arange(8.0).view(2, 4, 1, 1).clone() for _ in range(2)))
    storage.grow(3)
    storage.copy_page([0], 1, 2)
    keys, values = storage.read(0, torch.tensor([[3], [7], [11]]))
    assert keys.shape == (3, 1, 1, 1)
    assert keys.flatten().tolist() == values.flatten().tolist() == [3, 7, 7]
    assert storage.n_pages == 3
    assert storage.page_nbytes == 2 * 4 * 4


def test_a_plan_makes_the_metadata_of_every_group_at_once():
    plan = BatchPlan([2, 1], [3, 0], [3, 4, 0], [-1, 0, -1], [[[5, 6], [7]], [[], [1]]], 4)
    first, second = plan.metadata(torch.device("cpu"))
    first.check()
    assert first.page_table.tolist() == [[5, 6], [7, -1]]
    assert second.page_table.tolist() == [[-1], [1]]
    for one in (first, second):
        assert one.row_start.tolist() == [0, 2]
        assert [one.row_count.tolist(), one.base.tolist()] == [[2, 1], [3, 0]]
        assert [one.positions.tolist(), one.parents.tolist()] == [[3, 4, 0], [-1, 0, -1]]


def test_wrong_arguments_are_named():
    batch = batch_of([(40, tree(6))])
    with pytest.raises(ValueError, match="expected"):
        _run(replace(batch, q=batch.q[:3]))
    with pytest.raises(ValueError, match="do not fit"):
        _run(replace(batch, metadata=replace(batch.metadata, page_size=8)))
    with pytest.raises(ValueError, match="int32"):
        _run(replace(batch, metadata=replace(batch.metadata, base=batch.metadata.base.long())))
    with pytest.raises(ValueError, match="outside"):
        _run(replace(batch, metadata=replace(batch.metadata, row_start=batch.metadata.row_start + 1)))


@pytest.mark.parametrize("page", [-1, 1000])
def test_broken_plans_are_refused(page: int):
    if kernels() is None:
        pytest.skip("no C compiler")
    batch = batch_of([(40, tree(6))])
    table = batch.metadata.page_table.clone()
    table[0, 1] = page
    with pytest.raises(IndexError, match="no page"):
        _run(replace(batch, metadata=replace(batch.metadata, page_table=table)))
    for name in ("parents", "positions"):
        broken = getattr(batch.metadata, name).clone()
        broken[2] = 5000
        with pytest.raises(ValueError, match="tree"):
            _run(replace(batch, metadata=replace(batch.metadata, **{name: broken})))
