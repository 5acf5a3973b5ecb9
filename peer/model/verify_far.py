"""The check of a ragged span far from a sequence's start: behind every length that its config names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.backend import Attend, LayerSpec
from .hooks import EAGER, RAGGED, choose_attention
from .span import Span

_ROWS = 6
# Something may change there: a window, a chunk, the context of training, the step of a temperature.
_BORDERS = (
    "sliding_window",
    "attention_chunk_size",
    "original_max_position_embeddings",
    "floor_scale",
    "local_attention",
)
# Beyond, a past would not fit small machines.
_FARTHEST = 1 << 16


class DiffersFar(Exception):
    """A block gives other hidden states than in transformers' own attention, behind a border."""


@torch.inference_mode()
def check_far(span: Span, specs: Sequence[LayerSpec], tolerance: float) -> None:
    """Compare each block with transformers' own attention for rows around every border; raises DiffersFar."""
    noise = torch.Generator().manual_seed(2)
    device, end = span.backend.device, span.context_length
    rows = torch.randn(_ROWS, span.hidden_size, generator=noise).to(device, span.backend.stream)
    for border in borders(span.model.config.get_text_config(), end):
        start = max(0, border - _ROWS // 2)
        for spec, block in zip(specs, range(span.start, span.end), strict=True):
            # Large keys, so that what scales scores shows.
            keys = 3 * torch.randn(1, spec.kv_heads, start, spec.key_width, generator=noise).to(rows)
            values = torch.randn(1, spec.kv_heads, start, spec.value_width, generator=noise).to(rows)
            blocks = range(block, block + 1)
            choose_attention(span.model, EAGER)
            wanted = span.forward_cached(rows[None], [(keys, values)], blocks, end)[0][0]
            choose_attention(span.model, RAGGED)
            attend = _behind(keys[0].transpose(0, 1), values[0].transpose(0, 1))
            found = span.forward(rows, torch.arange(start, start + _ROWS, device=device), attend, blocks, end)
            if not (found - wanted).abs().max() <= tolerance * (wanted - rows).abs().max():
                raise DiffersFar(f"block {block} differs from transformers' own attention at position {border}")


def borders(config: Any, context_length: int) -> list[int]:
    """Lengths that a config names, rising, behind which a sequence may go on."""
    parts = [vars(config), *_ropes(getattr(config, "rope_parameters", None))]
    found = {part.get(name) for part in parts for name in _BORDERS}
    return sorted(b for b in found if type(b) is int and 0 < b <= min(context_length - _ROWS, _FARTHEST))


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """A rope's parameters; some configs have several ropes by kind of layer."""
    if isinstance(parameters, dict):
        yield parameters
        yield from (nested for nested in parameters.values() if isinstance(nested, dict))


def _behind(past_keys: Tensor, past_values: Tensor) -> Attend:
    """Plain attention of rows in order behind a past [length, kv_heads, width]."""
    start = len(past_keys)

    def attend(
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        group = query.shape[1] // key.shape[1]
        keys, values = (
            torch.cat((past, new)).repeat_interleave(group, 1) for past, new in ((past_keys, key), (past_values, value))
        )
        scores = torch.einsum("nhd,mhd->hnm", query, keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        positions = torch.arange(len(keys), device=query.device)
        distance = positions[start:, None] - positions
        scores = scores.masked_fill((distance < 0) | (distance >= (window or torch.inf)), -torch.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(query), 1)), 2)
        weights = scores.softmax(2)[:, :, : len(keys)]
        return torch.einsum("hnm,mhd->nhd", weights, values).contiguous()

    return attend
