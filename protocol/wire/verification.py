"""What the last stage, or a client that holds the LM head, does with logits: draw, walk, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import NDArray

from .. import petal_pb2 as pb
from .sampling import Floats, SamplingParams, TokenCounts, draw
from .tree import DraftTree, walk

# Changes the scores [vocab] of the token behind these ids, penalties applied, before temperature and cut-offs.
Reshape = Callable[[Sequence[int], Floats], Floats]


@dataclass
class TokenHistory:
    """Ids of a session's cached rows; those before `prompt_length` are its prompt."""

    ids: list[int] = field(default_factory=list)
    prompt_length: int = 0

    def truncate(self, length: int) -> None:
        del self.ids[length:]
        self.prompt_length = min(self.prompt_length, length)

    def fork(self) -> TokenHistory:
        return TokenHistory(list(self.ids), self.prompt_length)

    def counts(self, row0: int | None) -> TokenCounts:
        """Counts for the penalties; row 0 of a tree is emitted already, though not cached."""
        output = self.ids[self.prompt_length :]
        return TokenCounts(self.ids[: self.prompt_length], output if row0 is None else [*output, row0])


@dataclass(frozen=True)
class Logprobs:
    """Of one accepted row: its successor's log-probability and the likeliest ids."""

    chosen: float
    top: tuple[tuple[int, float], ...]

    def message(self) -> pb.RowLogprobs:
        return pb.RowLogprobs(chosen=self.chosen, top=[pb.Logprob(id=id, logprob=value) for id, value in self.top])


@dataclass(frozen=True)
class VerificationResult:
    """Accepted rows (row 0 first) and the token drawn behind the last of them."""

    accepted: list[int]
    next_token: int
    logprobs: list[Logprobs]


def verify(
    tree: DraftTree,
    logits: Sequence[NDArray[np.float32]] | NDArray[np.float32],
    params: SamplingParams,
    history: TokenHistory,
    base: int,
    top_logprobs: int = 0,
    reshape: Reshape | None = None,
) -> VerificationResult:
    """Walk the tree with a draw at each row. `logits` [vocab] of row u predict position base + depth(u) + 1."""
    counts = history.counts(tree.ids[0]) if params.penalized else TokenCounts()

    def draw_at(row: int, path: list[int]) -> int:
        shape = reshape and partial(reshape, [*history.ids, tree.ids[0], *path])
        return draw(logits[row], params, base + len(path) + 1, counts, path, shape)

    accepted, token = walk(tree, draw_at)
    successors = [tree.ids[row] for row in accepted[1:]] + [token]
    return VerificationResult(accepted, token, _logprobs([logits[row] for row in accepted], successors, top_logprobs))


def draw_after_prefill(
    logits: NDArray[np.float32],
    params: SamplingParams,
    history: TokenHistory,
    top_logprobs: int = 0,
    reshape: Reshape | None = None,
) -> VerificationResult:
    """The first token behind a prompt. `logits` is [vocab], of the prompt's last row."""
    counts = history.counts(None) if params.penalized else TokenCounts()
    shape = reshape and partial(reshape, history.ids)
    token = draw(logits, params, len(history.ids), counts, reshape=shape)
    return VerificationResult([], token, _logprobs([logits], [token], top_logprobs))


def _logprobs(logits: Sequence[NDArray[np.float32]], chosen: Sequence[int], top: int) -> list[Logprobs]:
    if not top:
        return []
    result = []
    for values, token in zip(logits, chosen, strict=True):
        row = values.astype(np.float64)
        row -= row.max()
        row -= np.log(np.exp(row).sum())
        best = np.argsort(-row, kind="stable")[:top]
        result.append(Logprobs(float(row[token]), tuple((int(i), float(row[i])) for i in best)))
    return result
