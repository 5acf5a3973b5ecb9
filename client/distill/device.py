"""The machine that trains: its GPUs, how much fits, what is worth compiling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...protocol.memory import available_bytes
from .shape import DistillError, DrafterShape, shape_for

# Weights, gradients and two moments in float32.
_TRAINING_BYTES = 16
# A pair of logits through both softmaxes and back.
_LOGIT_BYTES = 24
# Of what is free, as allocators leave holes.
_USABLE = 0.8


@dataclass(frozen=True)
class Scale:
    """How much is done at a time: dialogues and their length, rows of a training step over all processes, positions
    whose logits exist at once; held-out prompts on which trees are tried, and how many tokens of their answers."""

    sampled: int
    length: int
    trained: int
    chunk: int
    probes: int
    probe_tokens: int


GPU = Scale(sampled=8192, length=512, trained=256, chunk=4096, probes=8, probe_tokens=32)
CPU = Scale(sampled=32, length=128, trained=16, chunk=512, probes=1, probe_tokens=6)


def best_device() -> tuple[str, int]:
    """Kind and number of the devices to use."""
    return ("cuda", torch.cuda.device_count()) if torch.cuda.is_available() else ("cpu", 1)


def free_bytes(kind: str) -> int:
    """Memory of one device that nobody uses."""
    if kind == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return available_bytes()


def scale_for(kind: str, shape: DrafterShape, target_bytes: int, row_bytes: int, free: int) -> Scale:
    """What fits into `free` bytes of one device beside a target of `target_bytes`, which caches `row_bytes` a token.

    Raises DistillError that says which size would fit.
    """
    most = GPU if kind == "cuda" else CPU
    room = int(_USABLE * free) - target_bytes
    logits = most.chunk * shape.vocab * _LOGIT_BYTES
    if shape.parameters * _TRAINING_BYTES + logits > room:
        raise DistillError(_too_big(shape, target_bytes, room - logits, free))
    sampled = min(most.sampled, room // (most.length * max(1, row_bytes) + shape.vocab * _LOGIT_BYTES))
    return replace(most, sampled=max(1, sampled))


def _too_big(shape: DrafterShape, target_bytes: int, room: int, free: int) -> str:
    wanted = f"{shape.parameters / 1e6:.1f}M parameters beside a target of {target_bytes / 1e9:.1f} GB do not fit"
    try:
        fits = shape_for(max(0, room) // _TRAINING_BYTES, shape.vocab).parameters
    except DistillError:
        return f"{wanted} into {free / 1e9:.1f} GB: learn from a swarm with --initial-peers, or free some memory."
    # Rounded down: what is said must hold.
    return f"{wanted} into {free / 1e9:.1f} GB: --size {fits // 10**4 / 100:g}M fits."


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Fused where a GPU makes it pay; where compilation fails, torch goes on without."""
    if device.type != "cuda":
        return function
    torch._dynamo.config.suppress_errors = True  # type: ignore[attr-defined]
    return torch.compile(function, dynamic=False)
