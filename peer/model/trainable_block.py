"""One block of a model in transformers' own modules, for work that asks for gradients and other devices.

It is the class, the config and the reading of tensors that a peer uses; only the kernels differ.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...kernels.backend import Linear
from ...kernels.torch.backend import TorchBackend
from ...protocol.checkpoint.checkpoint import Checkpoint
from .hooks import ForwardContext
from .meta_model import build
from .span import Span
from .weights import fill


class TrainableBlock:
    """Block `index` in float32.

    `linears` by path and `vectors` (the weights of norms) by name, which are those of the checkpoint where the family
    renames nothing.
    """

    def __init__(self, checkpoint: Checkpoint, index: int, device: torch.device) -> None:
        """Read the block's tensors. Raises CheckpointError as `load_span` does."""
        backend = TorchBackend(device)
        meta = build(checkpoint, device)
        meta.initialize_buffers(set(meta.inside(index, index + 1)).__contains__)
        fill(meta, checkpoint, index, index + 1, backend)
        self.device = device
        self._run = range(index, index + 1)
        self._span = Span(meta.model, index, index + 1, checkpoint.n_blocks, backend)
        self.module = meta.layers[index]
        prefix = f"{meta.layers_path}.{index}."
        for path, module in list(self.module.named_modules()):
            if isinstance(module, Linear):
                parent, _, leaf = path.rpartition(".")
                setattr(self.module.get_submodule(parent), leaf, _plain(module))
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
        return self._span.through(ForwardContext(self._run, hidden), hidden)


def _plain(handle: Linear) -> nn.Linear:
    linear = nn.Linear(handle.in_features, handle.out_features, device="meta")
    linear.weight = nn.Parameter(handle.dense().contiguous(), requires_grad=False)
    bias = handle.bias
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.clone(), requires_grad=False))
    return linear
