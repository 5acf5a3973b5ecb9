"""A block of the Llama kind by its parts, for whoever computes it in fewer calls than it has modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LlamaParts:
    """Norm, attention, norm, gated MLP (arXiv 2307.09288); heads may have norms of their own (arXiv 2505.09388).

    Products are weight handles, norms the backend's own where those do the same.
    """

    before: Any
    query: Any
    key: Any
    value: Any
    query_norm: Any | None
    key_norm: Any | None
    out: Any
    between: Any
    gate: Any
    up: Any
    down: Any
    width: int
    """Of a head."""
    scale: float

    @classmethod
    def of(cls, layer: Any) -> LlamaParts:
        """A decoder layer of transformers'. Raises AttributeError for one that has other parts."""
        attention, mlp = layer.self_attn, layer.mlp
        return cls(
            layer.input_layernorm,
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            getattr(attention, "q_norm", None),
            getattr(attention, "k_norm", None),
            attention.o_proj,
            layer.post_attention_layernorm,
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            attention.head_dim,
            attention.scaling,
        )
