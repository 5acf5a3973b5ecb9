"""One block of a model in transformers' own modules, for work that asks for gradients and other devices.

It is the class, the config and the reading of tensors that a peer uses; only the kernels differ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.cpu.linear import PackedLinear
from ...protocol.checkpoint.checkpoint import Checkpoint
from .hooks import Run
from .meta_model import build, initialize_buffers
from .span import Span
from .weights import fill


class PlainBlock:
    """Block `index` in float32.

    `linears` by path and `vectors` (the weights of norms) by name, which are those of the checkpoint where the family
    renames nothing.
    """

    def __init__(self, checkpoint: Checkpoint, index: int, device: torch.device) -> None:
        """Read the block's tensors. Raises CheckpointError as `load_span` does."""
        skeleton = build(checkpoint)
        initialize_buffers(skeleton.model, set(skeleton.inside(index, index + 1)).__contains__)
        fill(skeleton, checkpoint, index, index + 1, lambda nbytes: None)
        self.device = device
        self._run = range(index, index + 1)
        self._span = Span(skeleton.model, index, index + 1, checkpoint.n_blocks)
        self.module = skeleton.layers[index]
        prefix = f"{skeleton.layers_path}.{index}."
        for path, module in list(self.module.named_modules()):
            if isinstance(module, PackedLinear):
                parent, _, leaf = path.rpartition(".")
                setattr(self.module.get_submodule(parent), leaf, _plain(module))
        for module in skeleton.model.modules():
            _move(module, device)
        self.linears = {
            prefix + path: module for path, module in self.module.named_modules() if type(module) is nn.Linear
        }
        self.vectors = {
            f"{prefix}{path}.{name}": parameter
            for path, module in self.module.named_modules()
            if type(module) is not nn.Linear
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter.dim() == 1
        }

    def __call__(self, hidden: Tensor) -> Tensor:
        """Sequences of hidden states [n, length, d] on the block's device -> what leaves the block."""
        return self._span.through(Run(self._run, hidden), hidden)


def _plain(packed: PackedLinear) -> nn.Linear:
    linear = nn.Linear(packed.in_features, packed.out_features, device="meta")
    linear.weight = nn.Parameter(packed.dense().contiguous(), requires_grad=False)
    bias = packed.bias[: packed.out_features]
    linear.register_parameter("bias", nn.Parameter(bias.clone(), requires_grad=False) if bias.any() else None)
    return linear


def _move(module: nn.Module, device: torch.device) -> None:
    """To `device`, what has values; stand-ins of one element stay that small."""
    for name, parameter in module._parameters.items():
        if parameter is not None and not parameter.is_meta:
            module._parameters[name] = nn.Parameter(_moved(parameter.data, device), requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None and not buffer.is_meta:
            module._buffers[name] = _moved(buffer, device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.dim() and not any(tensor.stride()):
        return tensor.new_zeros((), device=device).expand(tensor.shape)
    return tensor.to(device)
