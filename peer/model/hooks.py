"""A forward through transformers' own modules under our control: which blocks compute, what enters them, who attends.

Every block's `forward` is hooked. A hook hands the hidden states on by itself, so that peers that receive hidden states
skip whatever a model does between its embedding and its first block; and it lets its block compute only in a forward
that includes the block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

RAGGED = "petal"
EAGER = "eager"


class BlockAttend(Protocol):
    """What the attention interface calls: the block, its rows as `backend.Attend` has them, all that the block says."""

    def __call__(
        self, block: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor: ...


@dataclass
class ForwardContext:
    """One forward: `hidden` is what enters the next block, None where the model's own embedding decides.

    `extent`: length of the sequence that the rows are part of, where ropes depend on it; 0 leaves that to the rows.
    `windows` are those of the masks that the model asked for, in order: a probe's.
    """

    blocks: range
    hidden: Tensor | None = None
    attend: BlockAttend | None = None
    block: int = -1
    extent: int = 0
    windows: list[int | None] = field(default_factory=list)


class _Current(threading.local):
    """The forward of this thread."""

    context: ForwardContext | None = None


_current = _Current()


@contextmanager
def within(context: ForwardContext) -> Iterator[ForwardContext]:
    """Block hooks and attention of this thread follow `context`."""
    _current.context = context
    try:
        yield context
    finally:
        _current.context = None


def current() -> ForwardContext:
    assert _current.context is not None, "a hooked model runs within a context only"
    return _current.context


@dataclass
class BlockStyle:
    """What blocks of a model return: hidden states, alone (length 0) or first in a tuple."""

    length: int = 0


def hook_block(block: int, layer: nn.Module, style: BlockStyle) -> None:
    """Hook a block's forward; see the module."""
    compute: Callable[..., Any] = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        context = current()
        if context.hidden is None:
            context.hidden = args[0] if args else kwargs["hidden_states"]
        if block not in context.blocks:
            return (context.hidden, None, None)[: style.length] if style.length else context.hidden
        context.block = block
        if args:
            result = compute(context.hidden, *args[1:], **kwargs)
        else:
            result = compute(**{**kwargs, "hidden_states": context.hidden})
        context.hidden = result[0] if isinstance(result, tuple) else result
        return result

    layer.forward = forward  # type: ignore[method-assign]


def choose_attention(model: PreTrainedModel, name: str) -> None:
    """Let every attention module of `model` use the attention function registered as `name`."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = name


def ragged_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, N, width] -> [1, N, heads, width]."""
    context = current()
    assert context.attend is not None
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    return context.attend(context.block, query, key, value, attention_mask, options)[None], None


AttentionInterface.register(RAGGED, ragged_attention)
