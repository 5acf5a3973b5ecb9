"""Trees of rows in topological order: what a step brings, and what a drafter proposes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from ..errors import PetalError


class TreeError(PetalError, ValueError):
    """A tree that no peer may accept; the message says which row is wrong and what is allowed."""


class StepTree:
    """The rows of a step: row 0 has parent -1, every other row an earlier one. Walked once, where it is made."""

    parents: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Distance of every row from row 0. Raises TreeError where the rows are no tree."""
        if not self.parents:
            raise TreeError("a tree needs at least row 0")
        if self.parents[0] != -1:
            raise TreeError(f"row 0 has parent {self.parents[0]}, it must be -1")
        depths = [0]
        for row, parent in enumerate(self.parents[1:], start=1):
            if not 0 <= parent < row:
                raise TreeError(f"row {row} has parent {parent}, it must be from 0 to {row - 1}")
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def height(self) -> int:
        """Of the deepest row."""
        return max(self.depths)

    @cached_property
    def is_chain(self) -> bool:
        return self.height == len(self) - 1

    @cached_property
    def children(self) -> list[list[int]]:
        result: list[list[int]] = [[] for _ in self.parents]
        for row, parent in enumerate(self.parents[1:], start=1):
            result[parent].append(row)
        return result

    def path(self, row: int) -> list[int]:
        """Rows from row 0 to `row`."""
        rows = [row]
        while self.parents[rows[-1]] >= 0:
            rows.append(self.parents[rows[-1]])
        return rows[::-1]

    def check_path(self, rows: Sequence[int]) -> None:
        """Refuse a commit that is not a path from row 0 downwards. Raises TreeError."""
        if not rows or rows[0] != 0:
            raise TreeError("a commit starts with row 0")
        for before, row in pairwise(rows):
            if not 0 <= row < len(self.parents) or self.parents[row] != before:
                raise TreeError(f"row {row} is not a child of row {before} of the step before")


@dataclass(frozen=True)
class RowTree(StepTree):
    """A tree without tokens, which is all that a middle peer sees."""

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        _ = self.height


@dataclass(frozen=True)
class DraftTree(StepTree):
    """`ids[0]` is the last emitted token, not yet cached."""

    ids: tuple[int, ...]
    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.parents):
            raise TreeError(f"{len(self.ids)} ids but {len(self.parents)} parents")
        _ = self.height


@lru_cache(maxsize=256)
def chain(rows: int) -> RowTree:
    """A path of `rows` rows."""
    return RowTree(tuple(range(-1, rows - 1)))


def walk(tree: DraftTree, draw: Callable[[int, list[int]], int]) -> tuple[list[int], int]:
    """Verify a tree (SpecExec, arXiv 2406.02532): draw each node's successor, follow the child that equals it.

    `draw(row, path_ids)` returns the token that follows the path of ids from row 1 down to `row`.
    Returns the accepted rows, row 0 first, and the token drawn at the last of them. Exact for any tree,
    because what is drawn never depends on which children exist.
    """
    accepted: list[int] = [0]
    path_ids: list[int] = []
    while True:
        row = accepted[-1]
        token = draw(row, path_ids)
        child = next((c for c in tree.children[row] if tree.ids[c] == token), None)
        if child is None:
            return accepted, token
        accepted.append(child)
        path_ids.append(token)
