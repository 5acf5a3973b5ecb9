"""What the kernels compute, in float64 and as plainly as it can be said. For tests."""

import torch
from torch import Tensor

from .metadata import AttentionMetadata


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: [..., in], weight: [out, in], bias: [out] -> [..., out] in float64."""
    y = x.double() @ weight.double().T
    return y if bias is None else y + bias.double()


def attention(
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
    """Attention over stored rows in float64, with one boolean mask per segment.

    Arguments as `ops.attend` has them; returns [N, Hq, Dv].
    """
    out = q.new_zeros(*q.shape[:2], v_pages.shape[3], dtype=torch.float64)
    for segment in range(len(metadata.row_start)):
        start, count = int(metadata.row_start[segment]), int(metadata.row_count[segment])
        base = int(metadata.base[segment])
        pages = metadata.page_table[segment].clamp(min=0)
        keys = k_pages[pages].flatten(0, 1)[: base + count].double().nan_to_num()  # masked below where unused
        values = v_pages[pages].flatten(0, 1)[: base + count].double().nan_to_num()
        row_positions = metadata.positions[start : start + count].long()
        key_positions = torch.cat((torch.arange(base), row_positions))
        mask = torch.zeros(count, base + count, dtype=torch.bool)
        mask[:, :base] = True
        for row in range(count):
            parent = int(metadata.parents[start + row])
            if parent >= 0:
                mask[row] = mask[parent]
            mask[row, base + row] = True
        if window is not None:
            mask &= key_positions > row_positions[:, None] - window
        for head in range(q.shape[1]):
            kv_head = head * k_pages.shape[2] // q.shape[1]
            scores = scale * q[start : start + count, head].double() @ keys[:, kv_head].T
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~mask, -torch.inf)
            if sinks is not None:
                scores = torch.cat((scores, sinks[head].double().expand(count, 1)), dim=1)
            weights = torch.softmax(scores, dim=1)[:, : base + count]
            out[start : start + count, head] = weights @ values[:, kv_head]
    return out
