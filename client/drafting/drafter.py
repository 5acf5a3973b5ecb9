"""What a drafter is: it proposes a tree of likely continuations, which the chain then verifies in one pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from ...protocol.errors import PetalError
from ...protocol.wire.sampling import SamplingParams
from ...protocol.wire.tree import DraftTree


class DrafterError(PetalError, ValueError):
    """Why a drafter cannot serve this model, in one sentence."""


@dataclass(frozen=True)
class ScoredTree(DraftTree):
    """A draft tree whose rows are sorted by score, best first; row 0 scores 0.

    `scores[u]` estimates the log-probability that the target says the path to row u; a row scores below its parent.
    """

    scores: tuple[float, ...]

    @classmethod
    def root(cls, token: int) -> ScoredTree:
        """Without a guess: nothing but the last token."""
        return cls((token,), (-1,), (0.0,))


class Drafter(ABC):
    """Proposes trees for one sequence at a time. Any tree is exact; a good one saves trips.

    `heavy` drafters run a model: they get a thread of their own, and `level_s` is the time of one forward in seconds.
    """

    heavy: bool = False
    level_s: float = 0.0

    def fresh(self) -> Drafter:
        """A drafter of this kind for another sequence; itself where it keeps no text."""
        return self

    def start(self, prompt: Sequence[int], sampling: SamplingParams) -> None:  # noqa: B027 (most need not know)
        """An answer to `prompt` begins, drawn by `sampling`."""

    @abstractmethod
    def propose(self, ids: Sequence[int], budget: int, worth: float = 0.0) -> ScoredTree:
        """A tree of at most `budget` nodes below row 0, which is the last of `ids` (prompt and output so far).

        A forward that promises fewer than `worth` accepted tokens is not made.
        """

    def ahead(self) -> bool:
        """While a tree is in flight, draft on from its likeliest outcomes; False once there is nothing to gain."""
        return False


def merge(trees: Sequence[ScoredTree], budget: int) -> ScoredTree:
    """The best `budget` nodes of several trees with one root. A path that several propose keeps its best score."""
    if len(trees) == 1 and len(trees[0]) <= budget + 1:
        return trees[0]
    best: dict[tuple[int, ...], float] = {}
    for tree in trees:
        paths: list[tuple[int, ...]] = [()]
        for token, parent, score in zip(tree.ids[1:], tree.parents[1:], tree.scores[1:], strict=True):
            paths.append((*paths[parent], token))
            best[paths[-1]] = max(score, best.get(paths[-1], score))
    # A row scores below its parent in each tree, hence also by best scores: a prefix of this order is a tree.
    chosen = sorted(best, key=lambda path: (-best[path], len(path)))[:budget]
    rows = {(): 0} | {path: row for row, path in enumerate(chosen, start=1)}
    return ScoredTree(
        (trees[0].ids[0], *(path[-1] for path in chosen)),
        (-1, *(rows[path[:-1]] for path in chosen)),
        (0.0, *(best[path] for path in chosen)),
    )
