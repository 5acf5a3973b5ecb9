"""Blocks of the Llama kind in few calls: what their modules compute, without the price of a module a call.

For a few rows, calling the modules of a small model takes as long as its products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.cpu.gate import silu_gate
from ...kernels.cpu.rotary import rotate
from .hooks import Attend

if TYPE_CHECKING:
    from .span import Span


# Written so. Whether that holds for the installed transformers is found by trying; a trial alone would not do, since it
# misses what happens rarely: OLMo, say, clips large queries.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


class FusedBlock:
    """Norm, attention, norm, gated MLP (arXiv 2307.09288); heads may have norms of their own (arXiv 2505.09388)."""

    def __init__(self, layer: Any, window: int | None) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._window = window
        self._width: int = attention.head_dim
        self._scale: float = attention.scaling
        self._before, self._between = layer.input_layernorm.forward, layer.post_attention_layernorm.forward
        self._q, self._k, self._v = (p.forward for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        self._q_norm, self._k_norm = (_forward(getattr(attention, name, None)) for name in ("q_norm", "k_norm"))
        self._out = attention.o_proj.forward
        self._gate, self._up, self._down = (p.forward for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))

    def __call__(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Hidden states [N, d], angles [N, width] -> [N, d]."""
        normed = self._before(x)
        query = self._q_norm(self._heads(self._q(normed)))
        key = self._k_norm(self._heads(self._k(normed)))
        value = self._heads(self._v(normed))
        rotate(query, cos, sin)
        rotate(key, cos, sin)
        seen = attend(layer, query, key, value, scale=self._scale, window=self._window, softcap=None, sinks=None)
        x = x + self._out(seen.flatten(1))
        normed = self._between(x)
        return x + self._down(silu_gate(self._gate(normed), self._up(normed)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(len(x), -1, self._width)


class FusedSpan:
    """`forward` as `Span.forward`."""

    def __init__(self, span: Span) -> None:
        """Raises AttributeError for a model that has other parts than a Llama."""
        base = span.model.base_model
        self._start, self._blocks = span.start, range(span.start, span.end)
        self._embed: Callable[[Tensor], Tensor] = base.embed_tokens
        self._rotary: Callable[..., tuple[Tensor, Tensor]] = base.rotary_emb
        layers = base.layers[span.start : span.end]
        self._layers = [FusedBlock(layer, spec.window) for layer, spec in zip(layers, span.layers, strict=True)]

    def forward(self, rows: Tensor, positions: Tensor, attend: Attend, blocks: range | None = None) -> Tensor:
        x = rows if rows.is_floating_point() else self._embed(rows).float()
        cos, sin = (part[0].contiguous() for part in self._rotary(x[None], positions[None]))
        for block in blocks or self._blocks:
            layer = block - self._start
            x = self._layers[layer](layer, x, cos, sin, attend)
        return x


def _forward(norm: Any) -> Callable[[Tensor], Tensor]:
    return torch.nn.Identity().forward if norm is None else norm.forward
