"""Attention of a ragged batch over a paged cache, the same to the bit however rows are batched, cut or stored.

A row's result depends on its query and on the ordered list of keys and values it sees, nothing else: not on other
rows, pages, threads, or whether an ancestor is committed or pending. The torch code that stands in where there are
no native kernels works row by row for the same reason, and is slow.
"""

import ctypes
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ..metadata import AttentionPlan
from . import build as native

_CALL = struct.Struct("33q2d")  # call_t of attention.h
_FAULTS = {1: "a visible slot has no page", 2: "parents and positions of the plan do not make a tree"}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Stores k and v in the cache, then returns the attention of q over it: `write_kv` and `paged_attention` at once.

    q: [N, Hq, D], k: [N, Hkv, D], v: [N, Hkv, Dv]: any strides, values side by side are cheapest. k_pages:
    [P, page, Hkv, D], v_pages: [P, page, Hkv, Dv]: contiguous. All float32 or all bfloat16, on the CPU; sums are
    float32. Returns [N, Hq, Dv]. Query head h reads kv head h // (Hq / Hkv).

    window: a row at position p sees positions above p - window only. softcap: scores become cap * tanh(score / cap).
    sinks: [Hq] float32, one more logit per head, in the denominator only.
    Raises ValueError for tensors that do not fit together or a plan that is no tree, IndexError for a missing page.
    """
    out = q.new_empty(*q.shape[:2], v_pages.shape[3])
    _call(q, k, v, out, k_pages, v_pages, plan, scale, window, softcap, sinks)
    return out


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """`attend` for rows whose keys and values are stored already."""
    out = q.new_empty(*q.shape[:2], v_pages.shape[3])
    _call(q, None, None, out, k_pages, v_pages, plan, scale, window, softcap, sinks)
    return out


def write_kv(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan) -> None:
    """Stores row u of each segment in slot base + u. Shapes and errors as in `attend`."""
    _call(None, k, v, None, k_pages, v_pages, plan, 1.0, None, None, None)


def _call(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    out: Tensor | None,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    fields = plan.fields
    pages, page_size, kv_heads, key_width = k_pages.shape
    value_width = v_pages.shape[3]
    rows = plan.asking
    dtype = k_pages.dtype
    if dtype not in (torch.float32, torch.bfloat16) or v_pages.dtype != dtype:
        raise ValueError(f"pages are float32 or bfloat16, not {dtype} and {v_pages.dtype}")
    if v_pages.shape[:3] != k_pages.shape[:3] or page_size != plan.page_size:
        raise ValueError(f"pages {tuple(k_pages.shape)} and {tuple(v_pages.shape)} do not fit the plan")
    if not (k_pages.is_contiguous() and v_pages.is_contiguous() and k_pages.is_cpu and v_pages.is_cpu):
        raise ValueError("pages are contiguous tensors on the CPU")
    q_heads = kv_heads
    if q is not None:
        q_heads = q.shape[1]
        q = _rows(q, (rows, q_heads, key_width), dtype)
        if q_heads % kv_heads or (sinks is not None and (sinks.shape != (q_heads,) or sinks.dtype != torch.float32)):
            raise ValueError(f"{q_heads} query heads do not fit {kv_heads} kv heads or the sinks")
        sinks = None if sinks is None else sinks.contiguous()
    if k is not None and v is not None:
        k = _rows(k, (rows, kv_heads, key_width), dtype)
        v = _rows(v, (rows, kv_heads, value_width), dtype)
    if (function := native.function("petal_attention", ctypes.c_char_p, returns=ctypes.c_int)) is None:
        if k is not None and v is not None:
            _write(k, v, k_pages, v_pages, plan)
        if q is not None and out is not None:
            _attend(q, out, k_pages, v_pages, plan, scale, window, softcap, sinks)
        return
    status = function(
        _CALL.pack(
            *(0 if t is None else t.data_ptr() for t in (q, k, v, out, k_pages, v_pages, sinks)),
            *fields,
            pages,
            q_heads,
            kv_heads,
            key_width,
            value_width,
            *(0, 0) if q is None else q.stride()[:2],
            *(0, 0) if k is None else k.stride()[:2],
            *(0, 0) if v is None else v.stride()[:2],
            window or 0,
            dtype == torch.bfloat16,
            k is not None,
            q is not None,
            native.threads(),
            scale,
            softcap or 0.0,
        )
    )
    if status == 3:
        raise MemoryError("no memory for the plan's segments")
    if status:
        raise (IndexError if status == 1 else ValueError)(_FAULTS[status])


def _rows(x: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    if x.shape != shape or x.dtype != dtype or not x.is_cpu:
        raise ValueError(f"{tuple(x.shape)} {x.dtype} given, expected {shape} {dtype} on the CPU")
    return x if x.stride(2) == 1 else x.contiguous()


def _write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, plan: AttentionPlan) -> None:
    for segment, rows, asking in plan.segments():
        end = int(plan.base[segment]) + rows.stop - rows.start
        places = plan.places(segment, torch.arange(end - (asking.stop - asking.start), end))
        k_pages.flatten(0, 1)[places] = k[asking]
        v_pages.flatten(0, 1)[places] = v[asking]


def _attend(
    q: Tensor,
    out: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """One product per row and kv head, of a shape that only the row decides."""
    group = q.shape[1] // k_pages.shape[2]
    for segment, rows, asking in plan.segments():
        for row in range(asking.start, asking.stop):
            seen = _visible(plan, segment, rows, row + rows.stop - asking.stop, window)
            places = plan.places(segment, seen)
            keys = k_pages.flatten(0, 1)[places].float().transpose(0, 1)
            values = v_pages.flatten(0, 1)[places].float().transpose(0, 1)
            query = q[row].float().view(len(keys), group, -1)
            scores = torch.matmul(query, keys.transpose(1, 2)) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks.view(len(keys), group, 1)), dim=2)
            weights = torch.softmax(scores, dim=2)[:, :, : len(places)]
            out[row] = torch.matmul(weights, values).flatten(0, 1).to(out.dtype)


def _visible(plan: AttentionPlan, segment: int, rows: slice, row: int, window: int | None) -> Tensor:
    """Slots that a row sees, by position."""
    base, path, at = int(plan.base[segment]), [], row - rows.start
    while at >= 0:
        path.append(base + at)
        at = int(plan.parents[rows.start + at])
    slots = torch.cat((torch.arange(base), torch.tensor(path[::-1])))
    return slots[-window:] if window else slots


def move_rows(pools: Sequence[Tensor], pages: Tensor, from_slots: Tensor, to_slots: Tensor) -> None:
    """Moves slots of one sequence down in every pool: the commit of a path through a tree.

    pools: key and value pages of any number of layers, each [P, page, ...] and contiguous, one page size.
    pages: [max_pages] int32, the sequence's row of a page table. from_slots, to_slots: [n] int32, both increasing,
    to <= from. Raises ValueError for other tensors, IndexError for a slot without a page.
    """
    slots = torch.cat((from_slots, to_slots))
    if any(t.dtype != torch.int32 for t in (pages, slots)) or len(from_slots) != len(to_slots):
        raise ValueError("pages and slots are int32, and every slot has a target")
    if not pools or not len(from_slots):
        return
    page_size = pools[0].shape[1]
    if any(not p.is_contiguous() or not p.is_cpu or p.shape[:2] != pools[0].shape[:2] for p in pools):
        raise ValueError("pools are contiguous, on the CPU and agree about pages")
    if bool((to_slots > from_slots).any()) or int(slots.min()) < 0:
        raise ValueError("rows move down only")
    used = pages[slots // page_size]  # IndexError where the table is too short
    if int(used.min()) < 0 or int(used.max()) >= len(pools[0]):
        raise IndexError(_FAULTS[1])
    library = native.library()
    if library is None:
        places = used * page_size + slots % page_size
        for pool in pools:
            rows = pool.flatten(0, 1)
            rows[places[len(from_slots) :]] = rows[places[: len(from_slots)]]
        return
    count = len(pools)
    addresses = (ctypes.c_void_p * count)(*(p.data_ptr() for p in pools))
    sizes = (ctypes.c_int64 * count)(*(p.stride(1) * p.element_size() for p in pools))
    slots, pages = slots.contiguous(), pages.contiguous()
    start = slots.data_ptr()
    library.petal_move_rows(
        addresses,
        sizes,
        ctypes.c_int64(count),
        ctypes.c_void_p(pages.data_ptr()),
        ctypes.c_int64(page_size),
        ctypes.c_void_p(start),
        ctypes.c_void_p(start + 4 * len(from_slots)),
        ctypes.c_int64(len(from_slots)),
    )
