"""Reading a span's tensors into its modules: names and layouts as transformers converts them, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
from transformers.pytorch_utils import Conv1D

from ...kernels.backend import Backend, Embedding
from ...kernels.formats.base import QuantizedTensor
from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.layout import CheckpointError
from .dense import read_dense
from .heap import trim
from .meta_model import MetaModel, fill_in
from .precision import DENSE, WeightPrecision
from .quantized_checkpoint import Storage, storage_of

# Masks and frequencies that old exports stored beside the weights.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|attention\.(masked_)?bias|position_ids)$")


@dataclass
class _Source:
    """Stored tensors that make one or more of the model's: as they are, or through a conversion of the family."""

    names: list[tuple[str, str | None]] = field(default_factory=list)
    converter: WeightConverter | None = None


@dataclass
class _Plan:
    """For each tensor of the model (the first, where one conversion makes several) what it is made of.

    `stored` names those that are stored as they are, wanted or not; `extra` is what no tensor is made of.
    """

    sources: dict[str, _Source] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)


def fill(
    meta: MetaModel,
    checkpoint: Checkpoint,
    start: int,
    end: int,
    backend: Backend,
    progress: Callable[[int], None] = lambda nbytes: None,
    precision: WeightPrecision = DENSE,
) -> None:
    """Read what a peer with blocks [start, end) holds; `progress` hears the bytes of each tensor read.

    Raises CheckpointError for a tensor that is missing, left over, of the wrong shape, or not finite.
    """
    model = meta.model
    modules = dict(model.named_modules())
    wanted = {
        f"{path}.{name}" if path else name: modules[path]
        for path in meta.hosted(start, end)
        for name in _tensor_names(modules[path])
    }
    reader = _Reader(checkpoint, storage_of(checkpoint), meta, progress, precision.keep)
    plan = _plan(meta, checkpoint, reader.storage.names(_stored_names(checkpoint, start, end)), wanted)
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for name in plan.extra:
        if not _COMPUTED.search(name) and not any(pattern.search(name) for pattern in ignored):
            raise CheckpointError(f"{checkpoint.name} holds the tensor {name}, for which its config has no use.")
    filler = _Filler(meta, wanted, precision, backend)
    for target, source in plan.sources.items():
        for name, value in reader.values(source, target):
            filler.put(name, value)
        trim()
    for name in filler.missing():
        origin = _tied(meta, checkpoint, plan, name)
        if not filler.share(name, next((target for target, stored in plan.stored.items() if stored == origin), "")):
            filler.put(name, reader.read(origin, name))


def _tensor_names(module: nn.Module) -> Iterator[str]:
    yield from (name for name, parameter in module._parameters.items() if parameter is not None)
    persistent = module._buffers.keys() - module._non_persistent_buffers_set
    yield from sorted(name for name in persistent if module._buffers[name] is not None)


def _stored_names(checkpoint: Checkpoint, start: int, end: int) -> list[str]:
    """What a span may read: its blocks, and all that is outside of blocks."""
    others = {name for block in range(checkpoint.n_blocks) for name in checkpoint.block_tensors(block)}
    for block in range(start, end):
        others.difference_update(checkpoint.block_tensors(block))
    return sorted((name for name in checkpoint.tensors if name not in others), key=dot_natural_key)


def _plan(meta: MetaModel, checkpoint: Checkpoint, stored: Iterable[str], wanted: dict[str, nn.Module]) -> _Plan:
    model = meta.model
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    ties = _ties(model) if checkpoint.layout.tied else {}
    state = model.state_dict()
    prefix = model.base_model_prefix
    plan = _Plan()
    for name in stored:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state:
            plan.extra.append(name)
        if pattern is None:
            plan.stored[target] = name
        if target in wanted and target not in ties:
            source = plan.sources.setdefault(target, _Source())
            source.names.append((name, pattern))
            if pattern is not None and source.converter is None:
                source.converter = deepcopy(by_pattern[pattern])
    return plan


def _ties(model: nn.Module) -> dict[str, str]:
    """Tensors that a tied model takes from others, by the class's own word."""
    return dict(getattr(model, "_tied_weights_keys", None) or {})


class _Reader:
    """Reads tensors of a checkpoint, those of a weight format as they are stored; `progress` hears their bytes.

    GGUF's that are not kept so are decoded in pieces: at once that takes several times the memory.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        storage: Storage,
        meta: MetaModel,
        progress: Callable[[int], None],
        keep: bool,
    ) -> None:
        self.storage = storage
        self._decodes = storage.quant == "gguf" and not keep
        self._checkpoint, self._meta, self._progress = checkpoint, meta, progress

    def values(self, source: _Source, target: str) -> Iterator[tuple[str, Tensor | QuantizedTensor]]:
        if source.converter is None:
            yield target, self.read(source.names[-1][0], target)
            return
        for name, pattern in source.names:
            assert pattern is not None
            source.converter.add_tensor(target, name, pattern, self._dense(name))
        made = source.converter.convert(target, model=self._meta.model, config=self._meta.model.config)
        for name, value in made.items():
            yield name, value[0] if isinstance(value, list) else value

    def read(self, name: str, target: str) -> Tensor | QuantizedTensor:
        """A stored tensor that becomes the model's `target`."""
        if name not in self.storage.matrices or self._decodes:
            return self._dense(name)
        shape = getattr(self._meta.model.get_submodule(target.rpartition(".")[0]), target.rpartition(".")[2]).shape
        stored = self.storage.read(self._checkpoint, name, tuple(shape))
        self._progress(self.storage.nbytes(self._checkpoint, name))
        return stored

    def _dense(self, name: str) -> Tensor:
        checkpoint = self._checkpoint
        if name in self.storage.matrices and self.storage.quant != "gguf":
            raise CheckpointError(f"{checkpoint.name}: {name} is one of several that this family joins, not quantized.")
        value = read_dense(checkpoint, name)
        if value.numel() and not all(map(torch.isfinite, value.aminmax())):
            raise CheckpointError(f"{checkpoint.name}: {name} holds a value that is not finite: download it again.")
        self._progress(checkpoint.tensors[name].nbytes)
        return value


def _tied(meta: MetaModel, checkpoint: Checkpoint, plan: _Plan, name: str) -> str:
    """The stored tensor that also stands for `name`."""
    model, path = meta.model, name.rpartition(".")[0]
    if origin := plan.stored.get(_ties(model).get(name, "")):
        return origin
    if (
        checkpoint.layout.tied
        and name.endswith("weight")
        and model.get_submodule(path) is model.get_output_embeddings()
    ):
        return checkpoint.layout.token_matrix
    raise CheckpointError(f"{checkpoint.name} lacks the tensor {name}, which its config asks for.")


class _Filler:
    """Puts tensors into modules; a linear is packed as soon as it is whole, so that one at a time is held twice."""

    def __init__(
        self, meta: MetaModel, wanted: dict[str, nn.Module], precision: WeightPrecision, backend: Backend
    ) -> None:
        self._model, self._blocks = meta.model, f"{meta.layers_path}."
        self._precision, self._backend = precision, backend
        self._wanted = dict(wanted)
        self._quantized: dict[str, QuantizedTensor] = {}

    def put(self, name: str, value: Tensor | QuantizedTensor) -> None:
        module = self._wanted.pop(name, None)
        if module is None:
            return  # the other half of a conversion that another peer holds
        path = name.rpartition(".")[0]
        if isinstance(value, QuantizedTensor) and self._stays_quantized(module):
            self._quantized[path] = value
        else:
            self._set(name, module, value.dense() if isinstance(value, QuantizedTensor) else value)
        if not any(f"{path}.{other}" in self._wanted for other in _tensor_names(module)):
            self._finish(path, module)

    def share(self, name: str, origin: str) -> bool:
        """Let the LM head's `name` be the token matrix `origin`, where that is held as it is stored: once for both."""
        path = name.rpartition(".")[0]
        module, table = self._wanted[name], dict(self._model.named_modules()).get(origin.rpartition(".")[0])
        if not isinstance(table, Embedding) or type(module) is not nn.Linear or module.bias is not None:
            return False
        parent, _, leaf = path.rpartition(".")
        setattr(self._model.get_submodule(parent), leaf, table.matrix)
        module._parameters.clear()  # somebody may hold the module still
        del self._wanted[name]
        return True

    def missing(self) -> list[str]:
        """Parameters that nothing filled; buffers keep what initialization gave them."""
        return [name for name, module in self._wanted.items() if name.rpartition(".")[2] in module._parameters]

    def _stays_quantized(self, module: nn.Module) -> bool:
        if not self._precision.keep or type(module) is nn.Linear:
            return self._precision.keep
        return isinstance(module, nn.Embedding) and _scale_of(module) is not None

    def _set(self, name: str, module: nn.Module, value: Tensor) -> None:
        leaf = name.rpartition(".")[2]
        expected = getattr(module, leaf)
        if value.shape != expected.shape:
            raise CheckpointError(f"{name} has shape {list(value.shape)}, the config asks for {list(expected.shape)}.")
        value = value.to(self._backend.device, expected.dtype)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value

    def _finish(self, path: str, module: nn.Module) -> None:
        fill_in(module)
        if held := self._held(path, module):
            parent, _, leaf = path.rpartition(".")
            setattr(self._model.get_submodule(parent), leaf, held)
            module._parameters.clear()  # somebody may hold the module still
        elif isinstance(module, nn.Embedding) and self._precision.dtype != torch.float32:
            module.to(self._precision.dtype).register_forward_hook(lambda module, ids, rows: rows.float())

    def _held(self, path: str, module: nn.Module) -> nn.Module | None:
        """What takes a module's place: the same product by the backend, or a table that stays quantized."""
        stored, format = self._quantized.pop(path, None), self._precision.format
        if stored is not None and isinstance(module, nn.Embedding):
            return Embedding(self._backend.linear(stored), _scale_of(module) or 1.0)
        bias = module._parameters.get("bias")
        if stored is not None:
            return self._backend.linear(stored, bias)
        if (weight := _product_weight(module)) is None:
            return None
        if format is not None and path.startswith(self._blocks):
            made = QuantizedTensor(format, format.quantize(weight), (weight.shape[0], weight.shape[1]))
            return self._backend.linear(made, bias)
        return self._backend.linear(weight, bias, self._precision.dtype)


def _scale_of(module: nn.Embedding) -> float | None:
    """What an embedding multiplies its rows by, found by trying; None where it does anything else."""
    if type(module) is nn.Embedding:
        return 1.0
    rows = torch.randn(4, module.embedding_dim, generator=torch.Generator().manual_seed(0)).to(module.weight.device)
    weight = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
    try:
        found = module(torch.arange(4, device=rows.device))
    except Exception:  # it takes something else, in whatever way it says so
        return None
    finally:
        module._parameters["weight"] = weight
    scale = float(found[0, 0] / rows[0, 0]) if found.shape == rows.shape else 0.0
    return scale if torch.allclose(found, rows * scale, 1e-6, 0) else None


def _product_weight(module: nn.Module) -> Tensor | None:
    """[out, in] of modules that compute nothing but a product."""
    if type(module) is nn.Linear or (isinstance(module, nn.Linear) and _is_product(module)):
        return module.weight
    if isinstance(module, Conv1D):
        return module.weight.T.contiguous()
    return None


def _is_product(module: nn.Linear) -> bool:
    """Whether a subclass does what its base does, found by trying."""
    sample = torch.randn(2, module.in_features, generator=torch.Generator().manual_seed(0)).to(module.weight.device)
    try:
        found = module(sample)
    except Exception:  # it takes something else, in whatever way it says so
        return False
    product = F.linear(sample, module.weight, module.bias)
    return isinstance(found, Tensor) and found.shape == product.shape and torch.allclose(found, product, 1e-4, 1e-5)
