"""Drafts that keep to a grammar: what it forbids is never said, so it need not be verified."""

from __future__ import annotations

from collections.abc import Sequence

from ...protocol.checkpoint.tokenizer import Tokenizer
from ...protocol.grammar.grammar import GrammarCompiler, GrammarError, GrammarMatcher
from ..arguments import SettingsError
from ..load_once import LoadOnce
from .drafter import ScoredTree


class GrammarRegistry:
    """Matchers for drafts of one model's texts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._compilers: LoadOnce[GrammarCompiler] = LoadOnce()

    async def matcher(self, grammar: str, vocab_size: int) -> GrammarMatcher:
        """Raises SettingsError for a grammar that is none."""
        compiler = await self._compilers.get(str(vocab_size), lambda: _ready(self._tokenizer, vocab_size))
        try:
            return compiler.compile(grammar)
        except GrammarError as error:
            raise SettingsError(str(error)) from None


def _ready(tokenizer: Tokenizer, vocab_size: int) -> GrammarCompiler:
    compiler = GrammarCompiler(tokenizer, vocab_size)
    _ = compiler.tokens  # takes a while: on the loading thread
    return compiler


def pruned(tree: ScoredTree, matcher: GrammarMatcher, said: Sequence[int]) -> ScoredTree:
    """The rows that the grammar allows behind `said`, the answer so far, whose last token is row 0."""
    paths: list[list[int]] = [[]]
    for token, parent in zip(tree.ids[1:], tree.parents[1:], strict=True):
        paths.append([*paths[parent], token])
    good = set(range(len(tree)))
    for leaf in good - set(tree.parents):
        row = leaf
        for _ in range(len(paths[leaf]) - matcher.follows(said, paths[leaf])):
            good.discard(row)
            row = tree.parents[row]
    kept = sorted(good)
    place = {row: at for at, row in enumerate(kept)}
    return ScoredTree(
        tuple(tree.ids[row] for row in kept),
        (-1, *(place[tree.parents[row]] for row in kept[1:])),
        tuple(tree.scores[row] for row in kept),
    )
