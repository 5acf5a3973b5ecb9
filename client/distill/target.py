"""The target model where it is at hand: built by transformers' public API, whatever its family."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from ...peer.model import read_dense
from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.layout import CheckpointError, text_config
from .device import compiled
from .texts import Texts

_LOCKSTEP = "petal_lockstep"


class LockstepCache:
    """Keys and values of rows that all have the same length, with room for `room` tokens."""

    def __init__(self, room: int) -> None:
        self.length, self._room = 0, room
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, kv_heads, 1, width] of this token -> those of all tokens so far."""
        if layer not in self._layers:
            empty = (x.new_empty(*x.shape[:2], self._room, x.shape[3]) for x in (key, value))
            self._layers[layer] = (next(empty), next(empty))
        keys, values = self._layers[layer]
        keys[:, :, self.length : self.length + 1] = key
        values[:, :, self.length : self.length + 1] = value
        return keys[:, :, : self.length + 1], values[:, :, : self.length + 1]


class _Current(threading.local):
    cache: LockstepCache | None = None


_current = _Current()


def _lockstep_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for one new token a row: nothing is masked, as all rows are equally long."""
    if others.get("softcap") or others.get("s_aux") is not None:
        raise CheckpointError("this family's attention cannot be sampled in lockstep: give text with --data instead.")
    assert _current.cache is not None
    rows, heads, _, width = query.shape
    keys, values = _current.cache.extend(int(module.layer_idx), key, value)  # type: ignore[arg-type]
    start = max(0, keys.shape[2] - sliding_window) if sliding_window else 0
    # The queries that share a key head are rows of one product.
    grouped = query.reshape(rows, keys.shape[1], -1, width)
    out = F.scaled_dot_product_attention(grouped, keys[:, :, start:], values[:, :, start:], scale=scaling)
    return out.reshape(rows, 1, heads, -1), None


AttentionInterface.register(_LOCKSTEP, _lockstep_attention)


class LocalTarget:
    """A whole model on one device, without gradients."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self.device = device
        self._model = _load(checkpoint, target_dtype(device.type)).to(device).eval().requires_grad_(False)
        self._base: nn.Module = self._model.base_model
        self._whole = compiled(self._base, device)
        self._head: nn.Module = self._model.get_output_embeddings()
        self.vocab = int(self._head.weight.shape[0])  # type: ignore[union-attr, arg-type]

    @torch.no_grad()
    def lessons(self, texts: Texts, rows: Tensor, chunk: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """The target's logits [chunk, vocab] at flat positions `rows` of `texts` without their last column, by chunks.

        Each is asked for with the drafter's logits, which a whole distribution has no use for.
        """
        hidden = self._whole(input_ids=texts.ids.long(), use_cache=False).last_hidden_state
        for known in hidden[:, :-1].flatten(0, 1)[rows].split(chunk):
            yield functools.partial(self._lesson, known)

    @torch.no_grad()
    def _lesson(self, known: Tensor, _: Tensor) -> Tensor:
        return self._head(known)

    @contextmanager
    def lockstep(self, room: int) -> Iterator[LockstepCache]:
        """A cache that `step` fills."""
        _current.cache = LockstepCache(room)
        self._model.set_attn_implementation(_LOCKSTEP)
        try:
            # cuDNN's kernels would be planned anew for every length.
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
                yield _current.cache
        finally:
            _current.cache = None
            self._model.set_attn_implementation("sdpa")

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: LockstepCache) -> Tensor:
        """One more token in every row: ids [rows] -> logits [rows, vocab]."""
        positions = torch.full_like(tokens, cache.length)[:, None]
        hidden = self._base(input_ids=tokens[:, None], position_ids=positions, use_cache=False).last_hidden_state
        cache.length += 1
        return self._head(hidden[:, 0])


def target_dtype(kind: str) -> torch.dtype:
    """What the target computes in on a device of this kind."""
    return torch.bfloat16 if kind == "cuda" else torch.float32


def row_bytes(checkpoint: Checkpoint, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one token."""
    config = text_config(checkpoint.config)
    heads = config.get("num_attention_heads", 1)
    width = config.get("head_dim") or config.get("hidden_size", 0) // heads
    return 2 * checkpoint.n_blocks * int(config.get("num_key_value_heads", heads)) * int(width) * dtype.itemsize


def _load(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """The model in `dtype`, its tensors read from the checkpoint. Raises CheckpointError."""
    fields = dict(checkpoint.config)
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"transformers does not know this model's config: {error}") from error
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    state = {name: read_dense(checkpoint, name).to(dtype) for name in checkpoint.tensors}
    if checkpoint.layout.tied:
        state["lm_head.weight"] = state[checkpoint.layout.token_matrix]
    missing, _ = model.load_state_dict(state, strict=False)
    if missing:
        raise CheckpointError(f"{checkpoint.name} lacks the tensor {missing[0]} that its model class needs.")
    return model
