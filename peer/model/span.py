"""A span's forwards. No model family has code of its own.

Blocks that use transformers' attention interface run *ragged*: all rows of an iteration in one row, attention by a
function that each forward brings along. Others run *cached*: one session at a time over transformers' own cache, with
the family's own attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ...kernels.backend import Attend, Backend, Blocks, Forward, LayerSpec
from .fused import FusedSpan
from .hooks import ForwardContext, within
from .rope import by_sequence

KeysValues = tuple[Tensor, Tensor]


class NoKeysValues(RuntimeError):
    """A block that does not remember by keys and values: a state space, linear attention, another block's cache."""


class Span:
    """Blocks [start, end) of a model, with the embedding where start is 0 and the head where end is n_blocks.

    `layers`, `ragged` and `fused` are found out by `verify`: which of the two forwards works, and whether in few calls.
    """

    def __init__(self, model: PreTrainedModel, start: int, end: int, n_blocks: int, backend: Backend) -> None:
        config = model.config.get_text_config()
        self.start, self.end, self.n_blocks = start, end, n_blocks
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.context_length: int = getattr(config, "max_position_embeddings", None) or 2048
        self.layers: list[LayerSpec] = []
        self.ragged = False
        self.fused: FusedSpan | None = None
        self.whole: Blocks | None = None
        """The blocks as the backend computes them whole, for `fused`."""
        self.model, self.backend = model, backend
        # A sequence that is longer than one of these has other rotary angles in all its rows.
        self.rope_borders = by_sequence(model)
        self._base = model.base_model
        self._scored = backend.rowwise(self._logits)
        one = torch.zeros(1, 1, dtype=torch.long, device=backend.device)
        self._entry_width: int = model.get_input_embeddings()(one).shape[-1]
        # transformers' name for its cache from 5.24 on, and until then; some base models only pass arguments on.
        named = [inspect.signature(part.forward).parameters for part in (model, self._base)]
        self._cache = "cache" if any("cache" in names for names in named) else "past_key_values"

    @property
    def extents(self) -> tuple[int, ...]:
        """A length of sequence for each kind of rotary angles, see `rope_borders`; 0 where there is but one."""
        borders = self.rope_borders
        return (borders[0], *(border + 1 for border in borders)) if borders else (0,)

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that are held."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        return sum(t.untyped_storage().nbytes() for t in tensors if not t.is_meta)

    def exactness_obstacle(self) -> str:
        """Why a row's bits may depend on the rows beside it; empty where they do not."""
        if not self.ragged:
            return f"{type(self.model).__name__} attends by code of its own"
        for path, module in self.model.named_modules():
            held = [p for p in module.parameters(recurse=False) if not p.is_meta and p.dim() > 1]
            if held and not isinstance(module, nn.Embedding) and held[0].untyped_storage().nbytes() > 4:
                return f"{path} multiplies by code of its own"
        return ""

    @torch.inference_mode()
    def forward(
        self, rows: Tensor, positions: Tensor, attend: Attend, blocks: range | None = None, extent: int = 0
    ) -> Tensor:
        """Token ids [N] (from block 0 on) or hidden states [N, d], positions [N] -> hidden states [N, d].

        `blocks` is the part of the span to apply, all of it by default. `extent`: length of the sequences that the rows
        are part of, where the span has `rope_borders`; all rows are on the same side of each.
        """
        if self.fused is not None:
            return self.fused.forward(rows, positions, attend, blocks)

        def attend_block(
            block: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
        ) -> Tensor:
            assert mask is None, "ragged rows have no mask"
            layer = block - self.start
            return attend(
                layer, query, key, value, window=self.layers[layer].window, **attention_options(query, options)
            )

        context = ForwardContext(blocks or range(self.start, self.end), attend=attend_block, extent=extent)
        return self.through(context, rows[None], position_ids=positions[None])[0]

    def forward_at(self, extent: int) -> Forward:
        """`forward` for sequences of this extent, in as few calls as there are."""
        return self.fused.forward if self.fused else partial(self.forward, extent=extent)

    @torch.inference_mode()
    def forward_cached(
        self, rows: Tensor, past: Sequence[KeysValues], blocks: range | None = None, extent: int = 0
    ) -> tuple[Tensor, list[KeysValues]]:
        """A batch of pieces behind equally long pasts: ids [B, n] or hidden states [B, n, d].

        Returns hidden states [B, n, d] and what each block of `blocks` adds to its cache. Keys and values, there and in
        `past`, are [B, kv_heads, length, width]. Raises NoKeysValues.
        """
        blocks = blocks or range(self.start, self.end)
        cache = DynamicCache()
        length = past[0][0].shape[2] if past else 0
        if length:
            # A model asks any layer, hosted or not, how long the cache is.
            nothing = torch.zeros((), device=rows.device).expand(len(rows), 1, length, 1)
            for layer in range(self.n_blocks):
                keys, values = past[layer - blocks.start] if layer in blocks else (nothing, nothing)
                cache.update(keys, values, layer)
        hidden = self.through(ForwardContext(blocks, extent=extent), rows, cache)
        made = [cache.layers[layer] for layer in blocks if layer < len(cache.layers)]
        if len(made) < len(blocks) or any(layer.get_seq_length() != length + rows.shape[1] for layer in made):
            raise NoKeysValues("a block does not cache keys and values of its own")
        return hidden, [(layer.keys[:, :, length:], layer.values[:, :, length:]) for layer in made]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: [n, d] -> [n, vocab]."""
        assert self.end == self.n_blocks
        return self._scored(hidden)

    @torch.inference_mode()
    def _logits(self, hidden: Tensor) -> Tensor:
        with within(ForwardContext(range(0), hidden[None])):
            return self.model(inputs_embeds=self._entry(hidden[None]), use_cache=False).logits[0]

    def _entry(self, hidden: Tensor) -> Tensor:
        """What a model may take for embeddings where hidden states enter at a block: some embed in another width."""
        if hidden.shape[-1] == self._entry_width:
            return hidden
        return hidden.new_zeros(()).expand(*hidden.shape[:-1], self._entry_width)

    def through(
        self, context: ForwardContext, rows: Tensor, cache: DynamicCache | None = None, **options: Any
    ) -> Tensor:
        """The base model under `context`: ids [B, n] or hidden states [B, n, d] -> what leaves its last block."""
        ids = not rows.is_floating_point()
        inputs = {"input_ids": rows} if ids else {"inputs_embeds": self._entry(rows)}
        if cache is not None:
            options[self._cache] = cache
        if context.hidden is None and rows.is_floating_point():
            context.hidden = rows
        with within(context):
            self._base(**inputs, use_cache=cache is not None, **options)
        assert context.hidden is not None
        return context.hidden


def attention_options(query: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """What `Attend` takes, of what a block says to the attention interface."""
    scale = options.get("scaling")
    return {
        "scale": query.shape[-1] ** -0.5 if scale is None else scale,
        "softcap": options.get("softcap"),
        "sinks": options.get("s_aux"),
    }
