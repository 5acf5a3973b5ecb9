"""A draft model of the Llama kind in few calls: what `Span` computes, without the price of a module a call.

A draft model is so small that calling its modules takes longer than its products. Whether a model is of this kind is
found by trying: other models stay with `Span`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.linear import PackedLinear
from ...peer.span import Attend, Span

# Of the largest value; the sums are the same but for the activation function.
TOLERANCE = 1e-3


class _Layer:
    """Norm, attention, norm, gated MLP (arXiv 2307.09288), each product with its neighbours in one."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.head_width: int = attention.head_dim
        self.scale: float = attention.scaling
        self.norms = layer.input_layernorm.forward, layer.post_attention_layernorm.forward
        self.qkv = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = attention.o_proj.forward
        self.gate_up = _joined(mlp.gate_proj, mlp.up_proj)
        self.down = mlp.down_proj.forward
        self.heads = attention.q_proj.out_features // self.head_width
        self.kv_heads = attention.k_proj.out_features // self.head_width

    def __call__(self, index: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        heads = self.qkv(self.norms[0](x)).view(len(x), -1, self.head_width)
        turned = self.heads + self.kv_heads
        rotary, value = heads[:, :turned], heads[:, turned:]
        left, right = rotary.chunk(2, dim=-1)
        rotary = rotary * cos + torch.cat((-right, left), dim=-1) * sin
        query, key = rotary[:, : self.heads], rotary[:, self.heads :]
        seen = attend(index, query, key, value, scale=self.scale, window=None, softcap=None, sinks=None)
        x = x + self.out(seen.flatten(1))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class FusedModel:
    """`forward` as `Span.forward` of the whole model."""

    def __init__(self, span: Span) -> None:
        """Raises AttributeError for a model that has other parts than a Llama."""
        base = span.model.base_model
        self._embed: Callable[[Tensor], Tensor] = base.embed_tokens
        self._rotary: Callable[..., tuple[Tensor, Tensor]] = base.rotary_emb
        self._layers = [_Layer(layer) for layer in base.layers]

    @torch.inference_mode()
    def forward(self, rows: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        x = self._embed(rows).float()
        cos, sin = (part[0].unsqueeze(1) for part in self._rotary(x[None], positions[None]))
        for index, layer in enumerate(self._layers):
            x = layer(index, x, cos, sin, attend)
        return x


def fused(span: Span, attention: Callable[[], tuple[Tensor, Attend]]) -> FusedModel | None:
    """The same model in few calls, or None where it is of another kind.

    `attention` gives positions and the attention of a fresh text, for the trial.
    """
    try:
        model = FusedModel(span)
    except AttributeError:
        return None
    ids = torch.arange(4)
    expected = span.forward(ids, *attention())
    difference = (model.forward(ids, *attention()) - expected).abs().max()
    return model if float(difference) <= TOLERANCE * float(expected.abs().max()) else None


def _joined(*linears: nn.Module) -> Callable[[Tensor], Tensor]:
    """Linears of one input as one."""
    parts = [part for part in linears if isinstance(part, PackedLinear)]
    weight = torch.cat([part.dense() for part in parts])
    bias = torch.cat([part.bias[: part.out_features] for part in parts])
    return PackedLinear(weight, bias).forward
