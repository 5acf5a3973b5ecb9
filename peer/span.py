"""A span of blocks as transformers builds them: the one module that knows transformers' internals.

The model class is built on the meta device with only the span's layers, only their tensors are read, every linear
becomes one of `kernels`, and attention goes to a function that each forward brings along. No model family has
code of its own.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..kernels import norm
from ..kernels.linear import PackedLinear
from ..protocol.checkpoint import Checkpoint, CheckpointError

_ATTENTION = "petal"
_BLOCK = re.compile(r"(^|\.)(layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class LayerSpec:
    """What one layer asks of the KV cache."""

    kv_heads: int
    key_width: int
    value_width: int
    window: int | None


class Attend(Protocol):
    """query [N, heads, width], key and value [N, kv_heads, width] of the ragged row -> [N, heads, value_width]."""

    def __call__(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor: ...


class _Current(threading.local):
    """The attention of the forward that runs on this thread."""

    attend: Attend | None = None


_current = _Current()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, heads, N, width] -> [1, N, heads, width]."""
    assert _current.attend is not None
    assert attention_mask is None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = (x[0].transpose(0, 1) for x in (query, key, value))
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    out = _current.attend(layer, *rows, scale=scale, window=sliding_window, softcap=softcap, sinks=s_aux)
    return out[None], None


AttentionInterface.register(_ATTENTION, _attention)


@contextmanager
def _attending(attend: Attend) -> Iterator[None]:
    _current.attend = attend
    try:
        yield
    finally:
        _current.attend = None


class _Stub(nn.Module):
    """Stands where the base model stood, so that a causal LM's own head code runs on hidden states."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, inputs_embeds: Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.norm(inputs_embeds))


class Span:
    """Blocks [start, end) of a model, with the embedding where start is 0 and the head where end is n_blocks."""

    def __init__(self, config: PretrainedConfig, start: int, end: int, n_blocks: int, base: nn.Module) -> None:
        self.start, self.end, self.n_blocks = start, end, n_blocks
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self._base = base
        self._layers_name = next(name for name, child in base.named_children() if isinstance(child, nn.ModuleList))
        self._layers: nn.ModuleList = getattr(base, self._layers_name)
        self._head: nn.Module | None = None
        self.layers = self._probe()

    @torch.inference_mode()
    def forward(self, rows: Tensor, positions: Tensor, attend: Attend, blocks: range | None = None) -> Tensor:
        """Token ids [N] (from block 0 on) or hidden states [N, d], positions [N] -> hidden states [N, d].

        `blocks` is the part of the span to apply, all of it by default.
        """
        inputs = {"inputs_embeds" if rows.is_floating_point() else "input_ids": rows[None]}
        blocks = blocks or range(self.start, self.end)
        setattr(self._base, self._layers_name, self._layers[blocks.start - self.start : blocks.stop - self.start])
        with _attending(attend):
            out = self._base(**inputs, position_ids=positions[None], use_cache=False)
        return out.last_hidden_state[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and LM head: [n, d] -> [n, vocab]."""
        assert self._head is not None
        return self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]

    def _probe(self) -> list[LayerSpec]:
        """Ask every layer what it caches, by one dry forward of a single row."""
        specs: dict[int, LayerSpec] = {}

        def record(layer: int, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, **_: Any) -> Tensor:
            specs[layer] = LayerSpec(key.shape[1], key.shape[2], value.shape[2], window)
            return query.new_zeros(query.shape[0], query.shape[1], value.shape[2])

        self.forward(torch.zeros(1, self.hidden_size), torch.zeros(1, dtype=torch.long), record)
        return [specs[layer] for layer in range(self.end - self.start)]


def load_span(
    checkpoint: Checkpoint, start: int, end: int, progress: Callable[[int], None] = lambda nbytes: None
) -> Span:
    """Build blocks [start, end) and read only their tensors; `progress` hears the bytes of each tensor read.

    Raises CheckpointError where the checkpoint does not hold what the model class needs.
    """
    n_blocks = checkpoint.n_blocks
    if not 0 <= start < end <= n_blocks:
        raise CheckpointError(f"blocks {start}:{end} are no part of {checkpoint.name}, which has blocks 0:{n_blocks}")
    config = _sliced_config(checkpoint.config, start, end, n_blocks)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=_ATTENTION, dtype=torch.float32)
    model.eval().requires_grad_(False)
    base = model.base_model
    norm_name = _final_norm(base)
    _drop_unused(model, base, norm_name, head_peer=start == 0, tail_peer=end == n_blocks)
    _initialize_buffers(model)
    _fill(model, checkpoint, start, progress)
    _swap_norms(model)
    final_norm = getattr(base, norm_name)
    setattr(base, norm_name, nn.Identity())
    span = Span(config, start, end, n_blocks, base)
    if end == n_blocks:
        setattr(model, model.base_model_prefix, _Stub(final_norm))
        span._head = model
    return span


def _sliced_config(raw: dict[str, Any], start: int, end: int, n_blocks: int) -> PretrainedConfig:
    """The config of a model that has only these layers: the count, and every list with one entry a layer."""
    fields = deepcopy(raw)
    for key, value in fields.items():
        if isinstance(value, list) and len(value) == n_blocks:
            fields[key] = value[start:end]
    try:
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"transformers does not know this model's config: {error}") from error
    config.num_hidden_layers = end - start
    config.tie_word_embeddings = False
    return config


def _final_norm(base: nn.Module) -> str:
    names = [name for name, _ in base.named_children() if re.search(r"norm|ln_f", name)]
    if not names:
        raise CheckpointError(f"{type(base).__name__} has no final norm that Petal can find")
    return names[-1]


def _drop_unused(model: nn.Module, base: nn.Module, norm: str, *, head_peer: bool, tail_peer: bool) -> None:
    """Leave out what another peer of the route holds."""
    if not head_peer:
        model.set_input_embeddings(nn.Identity())  # type: ignore[operator]
    if not tail_peer:
        setattr(base, norm, nn.Identity())
        model.set_output_embeddings(nn.Identity())  # type: ignore[operator]


def _initialize_buffers(model: nn.Module) -> None:
    """Compute what no checkpoint stores (rotary frequencies), by transformers' own initialization."""
    for module in model.modules():
        pending = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in pending.items():
            module._buffers[name] = torch.full_like(buffer, float("nan"), device="cpu")
        if pending:
            model._init_weights(module)  # type: ignore[operator]


def _fill(model: nn.Module, checkpoint: Checkpoint, start: int, progress: Callable[[int], None]) -> None:
    """Read each parameter that the module tree asks for. Linears are packed one by one: the overhead is one tensor."""
    for path, module in list(model.named_modules()):
        wanted = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.is_meta}
        values = {}
        for name, parameter in wanted.items():
            stored = _stored_name(checkpoint, f"{path}.{name}", start)
            array = checkpoint.read_f32(stored)
            # A view of the file would tie the weights to it.
            values[name] = torch.from_numpy(array if array.flags.writeable else array.copy())
            if values[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{stored} has shape {tuple(values[name].shape)}, the config asks for {tuple(parameter.shape)}"
                )
            progress(checkpoint.tensors[stored].nbytes)
        if type(module) is nn.Linear and wanted:
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, PackedLinear(values["weight"], values.get("bias")))
        else:
            for name, value in values.items():
                module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _swap_norms(model: nn.Module) -> None:
    """Norms of one native call in place of those that behave the same."""
    for path, module in list(model.named_modules()):
        if "RMSNorm" in type(module).__name__ and (swapped := norm.like(module)):
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, swapped)


def _stored_name(checkpoint: Checkpoint, local: str, start: int) -> str:
    """The checkpoint's name of a local parameter: blocks are numbered from the model's first, a tied head is shared."""
    name = _BLOCK.sub(lambda match: f"{match[1]}{match[2]}.{int(match[3]) + start}.", local, count=1)
    if name in checkpoint.tensors:
        return name
    shared = checkpoint.shared_tensors()
    if name.endswith("weight") and not _BLOCK.search(name) and shared["head"] == shared["embedding"]:
        return shared["embedding"][0]
    raise CheckpointError(f"{checkpoint.name} lacks the tensor {name}, which its config asks for")
