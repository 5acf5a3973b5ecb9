"""A quantized block's continuous parameters fitted to what leaves it in the exact model: AQLM, section 3.4.

Codes stay; codebooks, scales, what outliers add, and the weights of norms move by Adam. So a block makes good, as far
as it can, what blocks before it did wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.trainable_block import TrainableBlock
from .method import Parts

_EPOCHS = 12
_BATCH_TOKENS = 4096
# Of the root mean square of what moves; it falls to zero along a half cosine.
_RATE = 6e-3


def tune(block: TrainableBlock, parts: Mapping[str, Parts], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Fit `parts`, by the linears' paths, and the block's norms, in place; returns the norms' weights by name.

    inputs, targets: [n, length, d], what enters the block behind quantized ones, and what would leave it if no block
    were.
    """
    with _trained(block, parts) as parameters:
        before, kept = _epoch(block, inputs, targets, None), [p.detach().clone() for p in parameters]
        groups = [{"params": [p], "lr": _RATE * float(p.detach().square().mean().sqrt())} for p in parameters]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _EPOCHS)
        for _ in range(_EPOCHS):
            _epoch(block, inputs, targets, optimizer)
            schedule.step()
        if not _epoch(block, inputs, targets, None) < before:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data = value
    for part in parts.values():
        part.settle()
    return {name: vector.data.cpu() for name, vector in block.vectors.items()}


def _epoch(block: TrainableBlock, inputs: Tensor, targets: Tensor, optimizer: torch.optim.Optimizer | None) -> float:
    """The mean error over all rows; with an optimizer, after a step for each batch."""
    size = max(1, _BATCH_TOKENS // inputs.shape[1])
    total = 0.0
    with torch.set_grad_enabled(optimizer is not None):
        for rows, wanted in zip(inputs.split(size), targets.split(size), strict=True):
            loss = _error(block(rows.to(block.device)), wanted.to(block.device))
            total += float(loss.detach()) * len(rows)
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return total / len(inputs)


def _error(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over tokens of the relative squared error: the next block norms each token by itself."""
    return ((found - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-12)).mean()


@contextmanager
def _trained(block: TrainableBlock, parts: Mapping[str, Parts]) -> Iterator[list[Tensor]]:
    """The linears compute from `parts`, whose tensors, like the norms' weights, want gradients."""
    parameters: list[Tensor] = [*block.vectors.values()]
    for path, part in parts.items():
        parameters += [tensor for tensor in part.continuous() if tensor.numel()]
        linear = block.linears[path]
        linear.forward = partial(_through, part, linear)  # type: ignore[method-assign]
    for parameter in parameters:
        parameter.requires_grad_()
    try:
        yield parameters
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for path in parts:
            del block.linears[path].__dict__["forward"]


def _through(part: Parts, linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, part.dense(), linear.bias)
