"""Trees as tests draft them."""

from __future__ import annotations

from collections.abc import Sequence

from petal.protocol.wire.tree import DraftTree, chain


def token_chain(ids: Sequence[int]) -> DraftTree:
    """A path of tokens."""
    return DraftTree(tuple(ids), chain(len(ids)).parents)
