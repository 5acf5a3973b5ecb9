"""A model class of transformers, empty but for what one peer hosts.

The whole model is built on the meta device, which costs no memory and leaves numbers, lists and kinds of layers as the
family means them. What another peer holds outside the blocks stays as zeros of one element, so that the model's own
code still runs; its results are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.layout import CheckpointError
from .hooks import EAGER, BlockStyle, ForwardContext, hook_block, within


@dataclass
class MetaModel:
    """A hooked model without weights, and the paths of modules outside its blocks that own some."""

    model: PreTrainedModel
    layers_path: str
    layers: nn.ModuleList
    before: set[str]
    after: set[str]
    device: torch.device
    """Where what is hosted will be."""

    def inside(self, start: int, end: int) -> list[str]:
        """Paths of all modules of blocks [start, end)."""
        blocks = tuple(f"{self.layers_path}.{block}." for block in range(start, end))
        return [path for path, _ in self.model.named_modules() if f"{path}.".startswith(blocks)]

    def hosted(self, start: int, end: int) -> list[str]:
        """Paths of modules whose weights a peer with blocks [start, end) holds; without any block, those around all."""
        ends = start == end
        before = self.before if start == 0 or ends else set()
        after = self.after if end == len(self.layers) or ends else set()
        return sorted(before | after) + self.inside(start, end)

    def initialize_buffers(self, chosen: Callable[[str], bool]) -> None:
        """Compute what no checkpoint stores (rotary frequencies) for modules of `chosen` paths."""
        _initialize_buffers(self.model, chosen, self.device)


def build(checkpoint: Checkpoint, device: torch.device) -> MetaModel:
    """The checkpoint's model class. Raises CheckpointError where the class cannot be served in spans."""
    model = _on_meta(checkpoint)
    path, layers = _layers(model, checkpoint.n_blocks)
    outside = {
        name: module for name, module in model.named_modules() if module._parameters and not name.startswith(f"{path}.")
    }
    _initialize_buffers(model, lambda name: not name.startswith(f"{path}."), device)
    for module in outside.values():
        _empty(module, device)
    style = BlockStyle()
    for block, layer in enumerate(layers):
        hook_block(block, layer, style)
    before, after = _roles(model, outside, style, device)
    return MetaModel(model, path, layers, before, after, device)


def _on_meta(checkpoint: Checkpoint) -> PreTrainedModel:
    config = _config(checkpoint)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=EAGER, dtype=torch.float32)
    # A class refuses a config in as many ways as there are authors.
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint.name}: transformers cannot build a {config.model_type} from this config: {_line(error)}"
        ) from error
    return model.eval().requires_grad_(False)


def _config(checkpoint: Checkpoint) -> PretrainedConfig:
    family = checkpoint.config.get("model_type")
    if family not in CONFIG_MAPPING:
        raise CheckpointError(f"{checkpoint.name}: transformers {transformers.__version__} knows no family {family!r}.")
    try:
        config = CONFIG_MAPPING[family].from_dict(_decoded(checkpoint.config))
    except Exception as error:
        raise CheckpointError(f"{checkpoint.name}: transformers refuses this config: {_line(error)}") from error
    # A tied head is found in the checkpoint, where its one matrix has one name.
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    return config


def _decoded(value: Any) -> Any:
    """A config's JSON with its infinite numbers, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        return float(value["__float__"]) if "__float__" in value else {key: _decoded(v) for key, v in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value


def _layers(model: PreTrainedModel, n_blocks: int) -> tuple[str, nn.ModuleList]:
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_blocks and not _within_list(name)
    }
    if len(found) > 1:
        text = set(model.get_decoder().modules())
        found = {name: module for name, module in found.items() if module in text}
    if len(found) != 1:
        lists = ", ".join(found) or "none"
        raise CheckpointError(f"{type(model).__name__} must have one list of {n_blocks} blocks, it has {lists}.")
    return next(iter(found.items()))


def _within_list(name: str) -> bool:
    """Whether a list is a part of one element of another list, as experts are."""
    return any(part.isdecimal() for part in name.split("."))


def _empty(module: nn.Module, device: torch.device) -> None:
    """Stand in for weights that another peer holds: zeros that take no memory."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            zeros = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)
            module._parameters[name] = nn.Parameter(zeros, requires_grad=False)
    if isinstance(module, nn.Linear):
        # A product with expanded zeros would copy them out.
        module.forward = partial(_zeros, module.out_features)  # type: ignore[method-assign]


def _zeros(width: int, x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], width)


def fill_in(module: nn.Module) -> None:
    """Undo `_empty` for a module that gets its weights."""
    if isinstance(module.__dict__.get("forward"), partial):
        del module.__dict__["forward"]


def _initialize_buffers(model: PreTrainedModel, chosen: Callable[[str], bool], device: torch.device) -> None:
    """Compute what no checkpoint stores (rotary frequencies) for modules of `chosen` paths, as transformers does."""
    owner = model
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owner = module
        if not chosen(path):
            continue
        pending = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        for name, buffer in pending.items():
            fill = float("nan") if buffer.is_floating_point() else 0
            module._buffers[name] = torch.full_like(buffer, fill, device=device)
        if pending:
            owner._init_weights(module)  # type: ignore[operator]


def _roles(
    model: PreTrainedModel, outside: dict[str, nn.Module], style: BlockStyle, device: torch.device
) -> tuple[set[str], set[str]]:
    """Which modules work before and which after the blocks; it settles `style` too."""
    containers = {name for name, module in outside.items() if list(module.children())}
    failure = ""
    for style.length in (0, 3, 2, 1):
        before, after = set(containers), set(containers)
        try:
            logits = _dry_run(model, outside, before, after, device)
        # A model class fails on what it cannot do in as many ways as there are authors.
        except Exception as error:
            failure = f": {_line(error)}"
            continue
        if logits.dim() == 3 and logits.shape[:2] == (1, 2):
            return before, after
    raise CheckpointError(f"{type(model).__name__} cannot be served: it makes no logits from token ids alone{failure}")


def _dry_run(
    model: PreTrainedModel, outside: dict[str, nn.Module], before: set[str], after: set[str], device: torch.device
) -> Tensor:
    """Logits of two rows that pass every block by; notes which modules the model calls before and after them."""
    context = ForwardContext(range(0))

    def note(name: str) -> None:
        (before if context.hidden is None else after).add(name)

    hooks = [
        module.register_forward_pre_hook(lambda module, inputs, name=name: note(name))  # type: ignore[misc]
        for name, module in outside.items()
    ]
    try:
        with within(context), torch.inference_mode():
            logits: Tensor = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits


def _line(error: BaseException) -> str:
    """The first line of a message, for a sentence."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
