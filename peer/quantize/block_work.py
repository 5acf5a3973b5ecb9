"""One block: what its linears see, and its linears quantized in the order in which they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.trainable_block import TrainableBlock
from .covariance import Covariance, relative_error
from .method import Method, Parts
from .tuning import tune

# Values of hidden states that go through a block at a time.
_BATCH_VALUES = 1 << 23


@dataclass
class Result:
    """A quantized block: the tensors that are new, by name, and relative errors by the linears' paths."""

    tensors: dict[str, Tensor]
    errors: dict[str, float]


def quantize_block(
    block: TrainableBlock, method: Method, inputs: Tensor, targets: Tensor, told: Callable[[str], None]
) -> Result:
    """Quantize in place the linears that `method` takes, each against what it sees behind those before it.

    inputs, targets: [n, length, d], what enters the block behind quantized ones, and what would leave it if no block
    were. told: hears the path of each linear that is done.
    """
    exact: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    parts: dict[str, Parts] = {}
    for stage in _stages(block, inputs):
        taken = [path for path in stage if method.takes(block.linears[path].weight.shape)]
        covariance = _covariance(block, taken[0], inputs) if taken else torch.empty(0)
        for path in taken:
            linear = block.linears[path]
            exact[path], seen[path] = linear.weight.data, covariance
            parts[path] = method.quantize(linear.weight.data, covariance)
            linear.weight.data = parts[path].dense()
            told(path)
    result = Result(tune(block, parts, inputs, targets), {})
    for path, found in parts.items():
        block.linears[path].weight.data = found.dense()
        result.errors[path] = relative_error(exact[path], found.dense(), seen[path])
        result.tensors.update({f"{path}.{name}": value.cpu() for name, value in found.tensors().items()})
    return result


@torch.no_grad()
def through(block: TrainableBlock, hidden: Tensor) -> Tensor:
    """What leaves the block for [n, length, d] on the CPU, there again."""
    return torch.cat([block(rows.to(block.device)).cpu() for rows in batches(hidden)])


def batches(hidden: Tensor) -> Iterable[Tensor]:
    """Rows of [n, length, d], a few at a time."""
    return hidden.split(max(1, _BATCH_VALUES // hidden[0].numel()))


def _stages(block: TrainableBlock, inputs: Tensor) -> list[list[str]]:
    """Linears in the order in which they compute, those together that see the same."""
    calls: list[tuple[str, Tensor]] = []
    with _watched(block.linears, lambda path, x: calls.append((path, x))), torch.no_grad():
        block(inputs[:1].to(block.device))
    stages: list[list[str]] = []
    last: Tensor | None = None
    for path, x in calls:
        if x is not last:
            stages.append([])
        if not any(path in stage for stage in stages):
            stages[-1].append(path)
        last = x
    return stages


def _covariance(block: TrainableBlock, path: str, inputs: Tensor) -> Tensor:
    """Of what the linear `path` sees."""
    linear = block.linears[path]
    covariance = Covariance(linear.in_features, block.device)
    with _watched({path: linear}, lambda path, x: covariance.add(x)), torch.no_grad():
        for rows in batches(inputs):
            block(rows.to(block.device))
    return covariance.mean()


@contextmanager
def _watched(linears: dict[str, nn.Linear], hear: Callable[[str, Tensor], None]) -> Iterator[None]:
    hooks = [
        linear.register_forward_pre_hook(lambda module, x, path=path: hear(path, x[0]))  # type: ignore[misc]
        for path, linear in linears.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
