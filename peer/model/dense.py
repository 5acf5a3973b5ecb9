"""Tensors of a checkpoint as dense values, whatever their type."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...kernels.formats.gguf import TYPES
from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.gguf_model import GgufCheckpoint
from ...protocol.checkpoint.layout import CheckpointError

_DENSE = ("F32", "F16", "BF16")
# Values decoded at a time: temporaries of this size stay in the processor's cache.
_CHUNK = 1 << 16


def read_dense(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor's values in float32, a copy; pages of the file that only this reading needed are let go.

    Raises CheckpointError for an unknown name or a type that cannot be decoded.
    """
    info = checkpoint.info(name)
    if not isinstance(checkpoint, GgufCheckpoint) or info.dtype in _DENSE:
        return torch.from_numpy(checkpoint.read_f32(name))
    kind = TYPES.get(info.dtype.lower())
    if kind is None:
        raise CheckpointError(f"Type {info.dtype} cannot be decoded: use a file of Q4_0 to Q8_0, Q4_K to Q6_K or F16.")
    blocks = checkpoint.packed(name).reshape(-1, kind.size)
    values = torch.empty(len(blocks), kind.block)
    step = _CHUNK // kind.block
    for start in range(0, len(blocks), step):
        piece = blocks[start : start + step]
        values[start : start + step] = kind.decode(torch.from_numpy(np.array(piece)), torch.float32)
        checkpoint.forget(piece)
    return values.view(info.shape)
