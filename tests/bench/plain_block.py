"""A 70B-shaped block in bfloat16 out of torch's own parts, as a graph: what a card does without us."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.bench.kernels_cuda import graph_ms

WIDTH, INNER, HEADS, KV_HEADS, HEAD = 8192, 28672, 64, 8, 128
CONTEXT = 1024


class PlainBlock:
    """Norm, attention over a contiguous cache with an explicit mask, norm, gated MLP."""

    def __init__(self) -> None:
        shapes = ((HEADS + 2 * KV_HEADS) * HEAD, WIDTH), (WIDTH, WIDTH), (2 * INNER, WIDTH), (WIDTH, INNER)
        self.qkv, self.out, self.gate_up, self.down = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.02 for shape in shapes
        )
        self.keys, self.values = torch.randn(2, 1, KV_HEADS, CONTEXT + 256, HEAD, device="cuda").bfloat16()
        self.norm = torch.ones(WIDTH, device="cuda", dtype=torch.bfloat16)

    def __call__(self, h: Tensor, mask: Tensor) -> Tensor:
        rows = len(h)
        qkv = F.linear(F.rms_norm(h, (WIDTH,), self.norm, 1e-5), self.qkv).view(rows, -1, HEAD).transpose(0, 1)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS])
        seen = CONTEXT + rows
        self.keys[0, :, CONTEXT:seen], self.values[0, :, CONTEXT:seen] = k, v
        attended = F.scaled_dot_product_attention(
            q[None], self.keys[:, :, :seen], self.values[:, :, :seen], attn_mask=mask, enable_gqa=True
        )
        h = h + F.linear(attended[0].transpose(0, 1).reshape(rows, WIDTH), self.out)
        gate, up = F.linear(F.rms_norm(h, (WIDTH,), self.norm, 1e-5), self.gate_up).chunk(2, 1)
        return h + F.linear(F.silu(gate) * up, self.down)


def plain_ms(rows: int) -> float:
    """Median milliseconds of a block."""
    block = PlainBlock()
    h = torch.randn(rows, WIDTH, device="cuda").bfloat16()
    mask = torch.rand(rows, CONTEXT + rows, device="cuda") > 0.5
    return graph_ms([lambda: block(h, mask)] * 4)
