"""Blocks of the Llama kind in few calls: what their modules compute, without the price of a module a call.

For a few rows, calling the modules of a small model takes as long as its products. Which models these are is told by
their code: `written_alike` compares the source of a family's modules with that of families that are known to compute
just this. A trial (see `verify`) would not do alone, since it misses what happens rarely: OLMo, say, clips large
queries. Nor would the source alone: of the modules named in it, as of the installed transformers, it shows nothing.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.backend import Attend, Backend, Blocks
from ...kernels.llama import LlamaParts

# Families that were read: theirs is what is written here, in one way or the other.
KNOWN = ("llama", "mistral", "qwen2", "qwen3")
# What an attention's own file adds to it, by name: the first calls the second. Attention itself is ours.
_CALLED = ("apply_rotary_pos_emb", "rotate_half")


class FusedBlock:
    """One block, part by part."""

    def __init__(self, parts: LlamaParts, window: int | None, backend: Backend) -> None:
        self._window, self._width, self._scale = window, parts.width, parts.scale
        self._before, self._between = parts.before.forward, parts.between.forward
        self._q, self._k, self._v = (p.forward for p in (parts.query, parts.key, parts.value))
        self._q_norm, self._k_norm = parts.query_norm, parts.key_norm
        self._out = parts.out.forward
        self._gate, self._up, self._down = (p.forward for p in (parts.gate, parts.up, parts.down))
        self._rotate, self._silu_gate = backend.rotate, backend.silu_gate

    def __call__(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Hidden states [N, d], angles [N, width] -> [N, d]."""
        heads = (len(x), -1, self._width)
        normed = self._before(x)
        query, key, value = self._q(normed).view(heads), self._k(normed).view(heads), self._v(normed).view(heads)
        if self._q_norm is not None and self._k_norm is not None:
            query, key = self._q_norm.forward(query), self._k_norm.forward(key)
        query, key = self._rotate(query, cos, sin), self._rotate(key, cos, sin)
        seen = attend(layer, query, key, value, scale=self._scale, window=self._window)
        x = x + self._out(seen.flatten(1))
        normed = self._between(x)
        return x + self._down(self._silu_gate(self._gate(normed), self._up(normed)))


class FusedSpan:
    """`forward` as `Span.forward`, of a base model's blocks from `start` on; windows are those of the blocks.

    whole: what the backend made of the blocks, if it computes them whole.
    """

    def __init__(
        self, base: Any, start: int, windows: list[int | None], backend: Backend, whole: Blocks | None = None
    ) -> None:
        """Raises AttributeError for a model that has other parts than a Llama."""
        self.whole = whole
        self._start, self._stream = start, backend.stream
        self._embed: Callable[[Tensor], Tensor] = base.embed_tokens
        self._rotary: Callable[..., tuple[Tensor, Tensor]] = base.rotary_emb
        parts = llama_parts(base, range(start, start + len(windows)))
        blocks = [FusedBlock(part, window, backend) for part, window in zip(parts, windows, strict=True)]
        self._blocks = range(start, start + len(blocks))
        # A forward asks for each block when its turn has come; who keeps blocks elsewhere brings them then.
        self.block_at: Callable[[int], FusedBlock] = blocks.__getitem__

    @torch.inference_mode()
    def forward(self, rows: Tensor, positions: Tensor, attend: Attend, blocks: range | None = None) -> Tensor:
        x = rows if rows.is_floating_point() else self._embed(rows).to(self._stream)
        # Angles come in the dtype of what they are asked for: in 16 bits those of far positions would be coarse.
        cos, sin = self._rotary(x[None, :1].float(), positions[None])
        cos, sin = cos[0].contiguous(), sin[0].contiguous()
        chosen = blocks or self._blocks
        if self.whole is not None:
            return self.whole(x, (cos, sin), attend, range(chosen.start - self._start, chosen.stop - self._start))
        for block in chosen:
            layer = block - self._start
            x = self.block_at(layer)(layer, x, cos, sin, attend)
        return x


def llama_parts(base: Any, blocks: range) -> list[LlamaParts]:
    """Of a base model's blocks. Raises AttributeError for a model that has other parts than a Llama."""
    return [LlamaParts.of(base.layers[block]) for block in blocks]


def written_alike(model: nn.Module) -> bool:
    """Whether a model's base, blocks, attention and MLP are written as those of a family that is fused here."""
    base: Any = getattr(model, "base_model", None)
    try:
        # Blocks may be of several kinds.
        kinds = {tuple(map(type, (base, layer, layer.self_attn, layer.mlp))) for layer in base.layers}
        plain = all(type(layer.mlp.act_fn) in (nn.SiLU, type(_silu())) for layer in base.layers)
        return plain and {tuple(_code(vars(part)["forward"]) for part in kind) for kind in kinds} <= _known()
    except (AttributeError, IndexError, KeyError, TypeError, OSError, SyntaxError):
        return False  # it has other parts, or brings no source


def _silu() -> nn.Module:
    """What this version of transformers calls "silu"."""
    found: nn.Module = importlib.import_module("transformers.activations").ACT2FN["silu"]
    return found


@functools.cache
def _known() -> set[tuple[str, ...]]:
    return set(_known_codes())


def _known_codes() -> Iterator[tuple[str, ...]]:
    for family in KNOWN:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        prefix = next(name for name in vars(module) if name.lower() == f"{family}model").removesuffix("Model")
        parts = ("Model", "DecoderLayer", "Attention", "MLP")
        yield tuple(_code(getattr(module, f"{prefix}{part}").forward) for part in parts)


@functools.cache
def _code(forward: Callable[..., Any]) -> str:
    """What a forward does, and what of its own file that calls: without annotations and words for people."""
    forward = inspect.unwrap(forward)
    names = forward.__code__.co_names
    called = _CALLED if _CALLED[0] in names else ()
    helpers = [inspect.unwrap(forward.__globals__[name]) for name in called]
    return "\n".join(_bare(inspect.getsource(function)) for function in (forward, *helpers))


def _bare(source: str) -> str:
    function = ast.parse(textwrap.dedent(source)).body[0]
    if not isinstance(function, ast.FunctionDef):
        raise TypeError("no function of its own")
    function.decorator_list, function.returns = [], None
    if ast.get_docstring(function) is not None:
        function.body = function.body[1:]
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(function)
