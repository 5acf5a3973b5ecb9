"""Operations in plain torch, on any device: slow, and the same for a row whatever the other rows.

A backend without kernels of its own computes with these, and its products are as independent as torch's are for
operands of one shape: every product here has a shape that the row alone decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .metadata import AttentionMetadata

TILE = 16  # rows of one product


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, in] float32 times weight [out, in], float32 or bfloat16, plus bias [out] -> [n, out] float32.

    x is rounded to the weight's dtype; sums are float32.
    """
    columns = weight.float().T
    x = x.to(weight.dtype).float()
    y = x.new_empty(len(x), len(weight))
    for out, rows in zip(y.split(TILE), x.split(TILE), strict=True):
        out.copy_(torch.matmul(F.pad(rows, (0, 0, 0, TILE - len(rows))), columns)[: len(rows)])
    return y if bias is None else y + bias


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """weight * x / sqrt(mean(x²) + epsilon) over the last axis."""
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads x [N, heads, width] by angles [N, width], in place (RoPE: Su et al., arXiv 2104.09864). Returns x."""
    left, right = x.chunk(2, dim=-1)
    return x.copy_(x * cos[:, None] + torch.cat((-right, left), dim=-1) * sin[:, None])


def silu_gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (SwiGLU: Shazeer, arXiv 2002.05202)."""
    return F.silu(gate) * up


def topk(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[n, width] -> its largest `count` values and their columns; largest first, among equals the lower column."""
    order = torch.sort(x, dim=1, descending=True, stable=True)
    return order.values[:, :count], order.indices[:, :count]


def write(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, metadata: AttentionMetadata) -> None:
    """Stores new rows of each segment in their slots: k [N, Hkv, D], v [N, Hkv, Dv]."""
    for segment, rows, asking in metadata.segments():
        end = int(metadata.base[segment]) + rows.stop - rows.start
        places = metadata.places(segment, torch.arange(end - (asking.stop - asking.start), end, device=k.device))
        if bool(((places < 0) | (places >= k_pages[..., 0, 0].numel())).any()):
            raise IndexError("a slot has no page")
        k_pages.flatten(0, 1)[places] = k[asking].to(k_pages.dtype)
        v_pages.flatten(0, 1)[places] = v[asking].to(v_pages.dtype)


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of q [N, Hq, D] over stored rows, pages [P, page, Hkv, D] and [P, page, Hkv, Dv] -> [N, Hq, Dv].

    One product per row and kv head. Options as `backend.Attend` has them.
    """
    q, out = q.contiguous(), q.new_empty(*q.shape[:2], v_pages.shape[3])
    group = q.shape[1] // k_pages.shape[2]
    for segment, rows, asking in metadata.segments():
        parents = metadata.parents[rows].tolist()
        for row in range(asking.start, asking.stop):
            path = _path(parents, row + rows.stop - asking.stop - rows.start)
            places = _visible(metadata, segment, path, window)
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
    return out


def _path(parents: Sequence[int], row: int) -> list[int]:
    path = []
    while row >= 0:
        path.append(row)
        if parents[row] >= row:
            raise ValueError("parents and positions do not make a tree")
        row = parents[row]
    return path[::-1]


def _visible(metadata: AttentionMetadata, segment: int, path: list[int], window: int | None) -> Tensor:
    """Places that a row sees, by position."""
    base = int(metadata.base[segment])
    slots = torch.cat((torch.arange(base), torch.tensor(path) + base)).to(metadata.base.device)
    return metadata.places(segment, slots[-window:] if window else slots)
