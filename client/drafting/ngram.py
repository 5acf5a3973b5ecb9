"""Drafts from the session's own text: what followed the last time these tokens were said (prompt lookup decoding)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from .drafter import Drafter, ScoredTree, merge

# Earlier occurrences that may each give a branch, and how far one is followed.
BRANCHES = 4
LENGTH = 24
# Matches longer than this are equally good.
LONGEST = 16


@dataclass
class _State:
    """A set of substrings with the same ends (Blumer et al., 1985). `end` is the latest of them."""

    length: int
    link: int
    end: int
    next: dict[int, int] = field(default_factory=dict)


class SuffixAutomaton:
    """All substrings of a growing text; adding a token takes constant time on average."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self._states = [_State(0, -1, 0)]
        self._last = 0

    def add(self, token: int) -> None:
        states = self._states
        self.ids.append(token)
        current = len(states)
        states.append(_State(len(self.ids), 0, len(self.ids)))
        at = self._last
        while at >= 0 and token not in states[at].next:
            states[at].next[token] = current
            at = states[at].link
        if at >= 0:
            states[current].link = self._with_length(at, token)
        self._last = current

    def _with_length(self, at: int, token: int) -> int:
        """The state of exactly `at`'s longest string and `token`; split off where it is part of a longer one."""
        states = self._states
        found = states[at].next[token]
        if states[found].length == states[at].length + 1:
            return found
        clone = len(states)
        states.append(_State(states[at].length + 1, states[found].link, states[found].end, dict(states[found].next)))
        while at >= 0 and states[at].next.get(token) == found:
            states[at].next[token] = clone
            at = states[at].link
        states[found].link = clone
        return clone

    def matches(self, limit: int) -> list[tuple[int, int]]:
        """(length, end) of suffixes of the text that occurred before, longest first; the text went on at `end`."""
        found: list[tuple[int, int]] = []
        at = self._states[self._last].link
        while at > 0 and len(found) < limit:
            state = self._states[at]
            found.append((state.length, state.end))
            at = state.link
        return found

    def touch(self) -> None:
        """Note that the suffixes of the text occurred just now; only then can the text go on without finding itself."""
        at = self._states[self._last].link
        for _ in range(LONGEST):  # in a text that repeats itself, all would be as many as its tokens
            if at <= 0:
                break
            self._states[at].end = len(self.ids)
            at = self._states[at].link


class NgramDrafter(Drafter):
    """Follows the latest earlier occurrences of the longest suffixes. Costs microseconds, so it is always on.

    How far a match of some length can be trusted is learned from what the target said after such matches.
    """

    def __init__(self) -> None:
        self._text = SuffixAutomaton()
        self._guesses: list[tuple[int, int]] = []
        # Hits and tries by length of match; the prior trusts long matches more.
        self._hits = [0.3 + 0.35 * length for length in range(LONGEST + 1)]
        self._tries = [3.0 + 0.4 * length for length in range(LONGEST + 1)]

    def fresh(self) -> NgramDrafter:
        return NgramDrafter()

    def propose(self, ids: Sequence[int], budget: int, worth: float = 0.0) -> ScoredTree:
        self._read(ids)
        chains = [self._follow(length, end, ids[-1], budget) for length, end in self._text.matches(BRANCHES)]
        return merge(chains, budget) if chains else ScoredTree.root(ids[-1])

    def _read(self, ids: Sequence[int]) -> None:
        """Take in what was said since the last proposal; a text that does not continue the last one starts afresh."""
        known = self._text.ids
        if list(ids[: len(known)]) != known:
            self._text, self._guesses = SuffixAutomaton(), []
        for token in ids[len(self._text.ids) :]:
            self._learn(token)
            self._text.touch()
            self._text.add(token)
            self._guesses = [(n, self._text.ids[end]) for n, end in self._text.matches(1)]

    def _learn(self, token: int) -> None:
        for length, guess in self._guesses:
            self._tries[min(length, LONGEST)] += 1
            self._hits[min(length, LONGEST)] += guess == token

    def _trust(self, length: int) -> float:
        """Chance that the next token follows a match of this length; below 1, so that scores fall along a path."""
        length = min(length, LONGEST)
        return min(self._hits[length] / self._tries[length], 0.98)

    def _follow(self, length: int, end: int, root: int, budget: int) -> ScoredTree:
        """The text behind `end` as a chain; every token that it adds lengthens the match."""
        tokens = self._text.ids[end : end + min(LENGTH, budget)]
        scores = [0.0]
        for depth in range(len(tokens)):
            scores.append(scores[-1] + math.log(self._trust(length + depth)))
        return ScoredTree((root, *tokens), tuple(range(-1, len(tokens))), tuple(scores))
