"""Rotary angles that depend on how long a sequence is.

transformers goes by the longest row of each forward, so that chunks, drafts and other sessions' rows would decide about
a row's angles. Here the sequence does, by its forward's `extent`: longrope (arXiv 2402.13753) has one set of angles up
to a border and another beyond it, for all rows; a sequence that crosses it is computed anew. "dynamic" angles change
with every token past the context that a model was trained for, which no peer serves: they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import current


def by_sequence(model: nn.Module) -> tuple[int, ...]:
    """Have the ropes of `model` go by the sequence; the lengths beyond which its angles are others, rising."""
    borders: set[int] = set()
    for module in model.modules():
        kinds: Any = getattr(module, "rope_type", None)
        if kinds is not None:
            static = {key: _static(kind) for key, kind in kinds.items()} if isinstance(kinds, dict) else _static(kinds)
            module.rope_type = static  # type: ignore[assignment]
        if found := set(_borders(module)):
            borders |= found
            _follow(module)
    return tuple(sorted(borders))


def _static(kind: Any) -> Any:
    return "default" if isinstance(kind, str) and "dynamic" in kind else kind


def _borders(module: nn.Module) -> Iterator[int]:
    kinds, config = getattr(module, "rope_type", None), getattr(module, "config", None)
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    pairs = [(kinds, parameters)] if isinstance(kinds, str) else []
    pairs += [(kind, parameters.get(key, {})) for key, kind in kinds.items()] if isinstance(kinds, dict) else []
    for kind, fields in pairs:
        if kind == "longrope":
            yield int(fields["original_max_position_embeddings"])


def _follow(module: nn.Module) -> None:
    """Let the module see one position more, the last of the sequence, and leave its angles out."""
    compute: Callable[..., tuple[Tensor, ...]] = module.forward

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        extent = current().extent
        if not extent:
            return compute(x, position_ids, *args, **kwargs)
        last = torch.full_like(position_ids[..., :1], extent - 1)
        angles = compute(x, torch.cat((position_ids, last), -1), *args, **kwargs)
        return tuple(part[..., :-1, :] for part in angles)

    module.forward = forward  # type: ignore[method-assign]
