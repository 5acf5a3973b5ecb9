"""What a drafter looks like: deep and thin, grouped queries, embedding and head one matrix (MobileLLM, 2402.14905)."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from ...protocol.errors import PetalError

# Q8_0 stores the values of a row by so many, so every width is a multiple of this.
GROUP = 32
_HEAD_DIM = 64
# The embedding's share of the parameters, above which fewer blocks cost more than wider rows bring.
_EMBEDDING_SHARE = 0.72


class DistillError(PetalError, ValueError):
    """Why no drafter can be made, in one sentence that says what would help."""


@dataclass(frozen=True)
class DrafterShape:
    """Sizes of a Llama whose embedding and LM head are one matrix."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    @property
    def parameters(self) -> int:
        """Values in all matrices and norms."""
        return self.vocab * self.hidden + self.layers * self._block + (2 * self.layers + 1) * self.hidden

    @property
    def _block(self) -> int:
        attention = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim
        return self.hidden * (attention + 3 * self.ffn)


def shape_for(parameters: int, vocab: int) -> DrafterShape:
    """The widest shape with at most `parameters` values whose blocks have their due. Raises DistillError."""
    # Blocks are at least square, whatever the vocabulary.
    widest = min(int(parameters * _EMBEDDING_SHARE) // vocab, math.isqrt(parameters)) // GROUP * GROUP
    for hidden in range(widest, 0, -GROUP):
        shape = _filled(parameters, vocab, hidden)
        if shape.ffn >= 2 * hidden:
            return shape
    least = replace(_filled(0, vocab, GROUP), ffn=2 * GROUP).parameters / _EMBEDDING_SHARE
    raise DistillError(f"--size {parameters / 1e6:g}M is too small for {vocab} tokens: {least / 1e6:.2g}M will do.")


def _filled(parameters: int, vocab: int, hidden: int) -> DrafterShape:
    """A shape of this width whose feed-forward layers take what is left."""
    layers = max(2, min(8, hidden // 28))
    heads = -(-hidden // _HEAD_DIM)
    kv_heads = heads // 2 if heads % 2 == 0 else heads
    bare = DrafterShape(vocab, hidden, layers, heads, kv_heads, _HEAD_DIM, 0)
    ffn = max(0, parameters - bare.parameters) // (3 * layers * hidden) // GROUP * GROUP
    return replace(bare, ffn=ffn)


def parameters_of(text: str) -> int:
    """Of "16M": 16,000,000. Raises DistillError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper())
    if not found:
        raise DistillError(f"--size is a number of parameters such as 16M or 1.5B, not {text}.")
    return int(float(found[1]) * {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}[found[2]])
