"""Best-first growth of a draft tree: SpecExec (arXiv 2406.02532), which keeps the nodes of highest path probability.

The tree outlives a round. What was drafted below the node that the target turned out to say is kept by `reroot`, so
drafting on while a tree is in flight means nothing but growing further.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .drafter import ScoredTree

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

# SpecExec's factor of 0.95 a level: a child scores strictly below its parent, so the best nodes always are a tree.
DECAY = math.log(0.95)
MAX_DEPTH = 32


class TreeBuilder:
    """Drafted nodes; node 0 is the last emitted token. A node is expanded once the draft model has seen it."""

    def __init__(self, root: int) -> None:
        self.tokens: Ints = np.array([root])
        self.parents: Ints = np.array([-1])
        self.depths: Ints = np.array([0])
        self.scores: Floats = np.zeros(1)
        self.expanded = np.zeros(1, dtype=bool)

    def __len__(self) -> int:
        return len(self.tokens)

    def frontier(self, budget: int, beams: int) -> Ints:
        """At most `beams` nodes to expand next, best first: those whose children may be among the best `budget`."""
        hopeful = ~self.expanded & (self.scores + DECAY > self._floor(budget)) & (self.depths < MAX_DEPTH)
        nodes = np.flatnonzero(hopeful)
        return nodes[np.argsort(-self.scores[nodes], kind="stable")[:beams]]

    def expand(self, nodes: Ints, tokens: Ints, logprobs: Floats) -> None:
        """Add the children of `nodes` [n]: `tokens` and `logprobs` [n, branch], where -inf says that there is none.

        All are kept, also those that no tree of this round has room for: they may after `reroot`.
        """
        self.expanded[nodes] = True
        which, child = np.nonzero(logprobs > -math.inf)
        parents = nodes[which]
        scores = self.scores[parents] + np.minimum(logprobs[which, child], 0.0) + DECAY
        self.tokens = np.concatenate((self.tokens, tokens[which, child]))
        self.parents = np.concatenate((self.parents, parents))
        self.depths = np.concatenate((self.depths, self.depths[parents] + 1))
        self.scores = np.concatenate((self.scores, scores))
        self.expanded = np.concatenate((self.expanded, np.zeros(len(which), dtype=bool)))

    def best(self, budget: int) -> ScoredTree:
        """The best `budget` nodes below the root."""
        order = np.argsort(-self.scores, kind="stable")[: budget + 1]
        rows = np.full(len(self), -1)
        rows[order] = np.arange(len(order))
        parents = rows[self.parents[order[1:]]]
        return ScoredTree(
            tuple(self.tokens[order].tolist()), (-1, *parents.tolist()), tuple(self.scores[order].tolist())
        )

    def child(self, node: int, token: int) -> int | None:
        """The child of `node` that says `token`."""
        found = np.flatnonzero((self.parents == node) & (self.tokens == token))
        return int(found[0]) if len(found) else None

    def ancestors(self, node: int) -> list[int]:
        """Nodes from the root down to `node`'s parent."""
        path: list[int] = []
        while (node := int(self.parents[node])) >= 0:
            path.append(node)
        return path[::-1]

    def reroot(self, node: int) -> Ints:
        """Make `node` the root and drop whatever is not below it. Returns the old indices of the nodes kept."""
        kept = np.zeros(len(self), dtype=bool)
        kept[node] = True
        for depth in range(int(self.depths[node]) + 1, int(self.depths.max()) + 1):
            kept |= (self.depths == depth) & kept[self.parents]
        old = np.flatnonzero(kept)
        new = np.full(len(self), -1)
        new[old] = np.arange(len(old))
        parents = new[self.parents[old]]
        parents[0] = -1
        self.tokens, self.parents, self.expanded = self.tokens[old], parents, self.expanded[old]
        self.depths = self.depths[old] - self.depths[node]
        self.scores = self.scores[old] - self.scores[node]
        return old

    def _floor(self, budget: int) -> float:
        """Score that a new node must exceed to be among the best `budget`."""
        if len(self) - 1 < budget:
            return -math.inf
        if budget <= 0:
            return math.inf
        return float(np.partition(self.scores[1:], -budget)[-budget])
