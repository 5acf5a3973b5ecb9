"""What a generation gives out, trip by trip, and where it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from ..protocol import petal_pb2 as pb
from ..protocol.checkpoint.tokenizer import Tokenizer
from .session.failover import Failover
from .session.result import Array, StepResult


@dataclass
class OutputChunk:
    """What one trip through the route brought: `nodes` were drafted in `draft_s` of its `seconds`.

    `logits` [ids, vocab] are what the tokens were chosen by, where they were asked for.
    `finish_reason` of the last one: "stop" at the end of text, "stop_string", "criterion", "time" or "length";
    `stop_string` is the one that was met.
    """

    ids: list[int]
    text: str = ""
    logprobs: list[pb.RowLogprobs] = field(default_factory=list)
    hops: list[pb.Hop] = field(default_factory=list)
    seconds: float = 0.0
    nodes: int = 0
    draft_s: float = 0.0
    finish_reason: str | None = None
    stop_string: str | None = None
    events: list[Failover] = field(default_factory=list)
    logits: Array | None = None


class OutputCutter:
    """Cuts the stream of tokens at the end of text, at a stop string, or after `limit` tokens; `left` of them may come.

    Text that may turn out to be the start of a stop string is held back.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        limit: int,
        eos_ids: Collection[int] = (),
        stop_strings: Sequence[str] = (),
        ending: Callable[[Sequence[int]], str | None] = lambda ids: None,
        visible: Collection[int] = (),
    ) -> None:
        """`visible` special tokens are part of the text.

        `ending` is asked behind each token whether the answer, by its ids so far, ends there, and why."""
        if stop_strings and tokenizer is None:
            raise ValueError("stop strings need a tokenizer")
        self.left = limit
        self._stops = stop_strings
        # Special tokens are no part of the text: where a stop string is one, its id is looked for.
        self._stop_ids = frozenset(eos_ids) | (tokenizer.special_ids_of(stop_strings) if tokenizer else frozenset())
        self._detokenizer = tokenizer.detokenizer(visible=visible) if tokenizer else None
        self._held = ""
        self._ending = ending
        self._said: list[int] = []

    def take(self, ids: list[int], result: StepResult) -> OutputChunk:
        """The part of `ids` that counts, with what the text gained."""
        chunk = OutputChunk([], logprobs=result.logprobs, hops=result.hops)
        for token in ids:
            chunk.ids.append(token)
            self._said.append(token)
            self.left -= 1
            if token in self._stop_ids:
                chunk.finish_reason = "stop"
            else:
                self._held += self._detokenizer.add(token) if self._detokenizer else ""
                if self._cut_at_stop(chunk):
                    chunk.finish_reason = "stop_string"
                else:
                    chunk.finish_reason = "length" if not self.left else self._ending(self._said)
            if chunk.finish_reason:
                break
        chunk.logprobs = chunk.logprobs[: len(chunk.ids)]
        chunk.logits = None if result.logits is None else result.chosen_by[: len(chunk.ids)]
        if chunk.finish_reason != "stop_string":
            self._release(chunk)
        return chunk

    def _cut_at_stop(self, chunk: OutputChunk) -> bool:
        if not self._stops:
            return False
        # An answer that ends here says what is pending, too.
        said = self._held + (self._detokenizer.pending if self._detokenizer else "")
        found = [(at, stop) for stop in self._stops if (at := said.find(stop)) >= 0]
        if found:
            first, chunk.stop_string = min(found)
            chunk.text += said[:first]
        return bool(found)

    def _release(self, chunk: OutputChunk) -> None:
        if chunk.finish_reason and self._detokenizer:
            self._held += self._detokenizer.flush()
        keep = 0 if chunk.finish_reason else self._possible_stop()
        cut = len(self._held) - keep
        chunk.text += self._held[:cut]
        self._held = self._held[cut:]

    def _possible_stop(self) -> int:
        longest = 0
        for stop in self._stops:
            for size in range(1, min(len(stop), len(self._held) + 1)):
                if self._held.endswith(stop[:size]):
                    longest = max(longest, size)
        return longest
