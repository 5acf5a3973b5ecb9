"""A small model out of a backend's parts, and batches for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from petal.kernels.backend import Attend, LayerSpec
from petal.kernels.formats.base import QuantizedTensor
from petal.kernels.formats.registry import FORMATS
from petal.kernels.metadata import BatchPlan
from torch import Tensor

from tests.kernels.quantized_weights import random_tensors

WIDTH, INNER, HEADS, KV_HEADS, HEAD, LAYERS = 256, 512, 8, 2, 32, 3
PAGE = 16
SPEC = LayerSpec(KV_HEADS, HEAD, HEAD, None)


def depths(parents: Sequence[int]) -> list[int]:
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def plan_of(segments: list[tuple[int, list[int]]], tables: list[list[int]]) -> BatchPlan:
    return BatchPlan(
        counts=[len(parents) for _, parents in segments],
        bases=[base for base, _ in segments],
        positions=[base + depth for base, parents in segments for depth in depths(parents)],
        parents=[parent for _, parents in segments for parent in parents],
        tables=[tables],
        page_size=PAGE,
    )


class Model:
    """Blocks of the Llama kind out of a backend's parts."""

    def __init__(self, backend, format: str = "int4") -> None:
        self.backend, self.layers = backend, [self._layer(backend, format, 10 * i) for i in range(LAYERS)]

    def _layer(self, backend, format: str, seed: int) -> dict:
        def linear(out: int, width: int, seed: int):
            tensors = random_tensors(FORMATS[format], (out, width), seed)
            return backend.linear(QuantizedTensor(FORMATS[format], tensors, (out, width)))

        kv = KV_HEADS * HEAD
        shapes = {"q": (WIDTH, WIDTH), "k": (kv, WIDTH), "v": (kv, WIDTH), "o": (WIDTH, WIDTH), "gate": (INNER, WIDTH),
                  "up": (INNER, WIDTH), "down": (WIDTH, INNER)}  # fmt: skip
        parts = {name: linear(*shape, seed + i) for i, (name, shape) in enumerate(shapes.items())}
        return parts | {name: backend.rms_norm(torch.ones(WIDTH), 1e-5) for name in ("before", "between")}

    def __call__(self, rows: Tensor, positions: Tensor, attend: Attend, blocks: range) -> Tensor:
        angles = positions.float()[:, None] * 0.7 ** torch.arange(HEAD // 2, device=rows.device)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        x = rows
        for index in blocks:
            p = self.layers[index]
            normed = p["before"](x)
            q, k, v = (p[name](normed).view(len(x), -1, HEAD) for name in "qkv")
            q, k = self.backend.rotate(q, cos, sin), self.backend.rotate(k, cos, sin)
            x = x + p["o"](attend(index, q, k, v, scale=HEAD**-0.5).flatten(1))
            normed = p["between"](x)
            x = x + p["down"](self.backend.silu_gate(p["gate"](normed), p["up"](normed)))
        return x
