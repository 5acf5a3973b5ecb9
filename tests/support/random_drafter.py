"""A drafter of random trees, for tests: no tree may change a token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from petal.client.drafting.drafter import Drafter, ScoredTree


@dataclass
class RandomDrafter(Drafter):
    """Trees of random shape; some nodes follow the known answer, so that paths are really accepted."""

    answer: dict[tuple[int, ...], int]
    vocab: int
    rng: random.Random

    @classmethod
    def knowing(cls, ids: list[int], vocab: int, seed: int) -> RandomDrafter:
        return cls({tuple(ids[:i]): ids[i] for i in range(1, len(ids))}, vocab, random.Random(seed))

    def propose(self, ids: Sequence[int], budget: int, worth: float = 0.0) -> ScoredTree:
        tokens, parents, paths = [ids[-1]], [-1], [tuple(ids)]
        for _ in range(self.rng.randint(0, budget)):
            parent = self.rng.randrange(len(tokens))
            right = self.answer.get(paths[parent])
            token = right if right is not None and self.rng.random() < 0.6 else self.rng.randrange(self.vocab)
            if any(p == parent and t == token for p, t in zip(parents, tokens, strict=True)):
                continue
            tokens.append(token)
            parents.append(parent)
            paths.append((*paths[parent], token))
        return ScoredTree(tuple(tokens), tuple(parents), tuple(-float(row) for row in range(len(tokens))))
