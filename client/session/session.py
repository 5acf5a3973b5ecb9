"""A session: one sequence's state along a route of peers, whoever of them fails meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...protocol.trust.channels import Channels
from ...protocol.wire.codec import row_bytes
from ...protocol.wire.sampling import SamplingParams
from ...protocol.wire.tree import DraftTree
from ...protocol.wire.verification import Reshape, TokenHistory
from ..arguments import SettingsError
from ..routing.route import Route, context_of
from .failover import Failover, PeerFinder, RouteKeeper
from .options import SessionOptions
from .pipeline import Pipeline
from .result import OutputOptions, StepResult, joined
from .sequence import SequenceState
from .steps import StepStream

# Bytes of a prompt's chunks that may be on their way at a time; two chunks always may.
PREFILL_BYTES = 8 << 20


class Session:
    """Sends steps along a route. Where a peer fails, another takes its place and the session goes on.

    `reshape` changes scores before each draw, where this machine draws.
    """

    def __init__(
        self,
        route: Route,
        finder: PeerFinder,
        channels: Channels,
        options: SessionOptions,
        sequence: SequenceState | None = None,
    ) -> None:
        self.options = options
        self.reshape: Reshape | None = None
        self._finder = finder
        self._channels = channels
        self._sequence = sequence or SequenceState()
        self._pipeline = Pipeline(channels, options)
        self._keeper = RouteKeeper(self._pipeline, route, finder, options)
        self._steps = StepStream(self._sequence, self._pipeline, self._keeper, options)

    def __repr__(self) -> str:
        return f"<Session of {len(self.ids)} tokens: {' > '.join(stop.name for stop in self.route)}>"

    @property
    def ids(self) -> list[int]:
        """The tokens whose rows every peer holds, once the next step has told them."""
        return self._sequence.ids

    @property
    def route(self) -> Route:
        """The peers that it runs through now."""
        return self._keeper.route

    @property
    def context_length(self) -> int:
        """Positions that every peer can hold."""
        return context_of(self.route)

    @property
    def max_rows(self) -> int:
        """Rows that the route's peers take in a step."""
        return self._pipeline.max_rows

    @property
    def max_nodes(self) -> int:
        """Rows of a tree below row 0; none where a peer knows no trees."""
        return self._pipeline.max_nodes

    def room(self, length: int) -> int:
        """Tokens that a sequence of `length` may grow by before its rows must be computed anew."""
        ahead = [border - length for border in self._pipeline.rope_borders if border >= length]
        return min(ahead) if ahead else self.context_length

    async def open(self) -> None:
        """Reserve on every peer and join the links, or release all and raise PeerError."""
        await self._pipeline.open(self.route)

    def close(self) -> None:
        """Release what the peers hold."""
        self._pipeline.close()

    async def __aenter__(self) -> Session:
        if not self._pipeline.hops:
            await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def fork(self) -> Session:
        """A session with the same state, and this one's pages on every peer that lets it. Raises PeerError, NoRoute."""
        child = Session(self.route, self._finder, self._channels, self.options, self._sequence.fork())
        await child._steps.open_fork(self.route, self._pipeline.session_id)
        return child

    def take_events(self) -> list[Failover]:
        """What happened to the route since the last call."""
        return self._keeper.take_events()

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; peers hear of it with the next step."""
        self._sequence.rewind_to(length)

    async def prefill(
        self,
        ids: Sequence[int],
        sampling: SamplingParams | None = None,
        output: OutputOptions | None = None,
        chunk: int = 0,
    ) -> StepResult:
        """Append prompt tokens, in chunks that follow each other through the route without waiting.

        With `sampling` the last stage draws the next token. Returns the last chunk's answer; logits and hidden states
        are of all rows. `chunk` rows are sent at a time, by default what suits the route. Raises PeerError, NoRoute.
        """
        if not ids:
            raise SettingsError("there is nothing to prefill")
        await self._fit(length := len(self.ids) + len(ids))
        results = await self._append(ids, length, sampling, output := output or OutputOptions(), chunk)
        if sampling is not None and self.options.local_ends:
            await self._draw(results[-1], None, output)
        return joined(results, output)

    async def _fit(self, length: int) -> None:
        """Have the cached rows computed for a sequence of this length; ropes of some models depend on it."""
        sequence = self._sequence
        if not sequence.extend(length, self._pipeline.rope_borders):
            ids, prompt_length = list(sequence.ids), sequence.prompt_length
            sequence.rewind_to(0)
            await self._append(ids, length, None, OutputOptions(), 0)
            sequence.prompt_length, sequence.retelling = prompt_length, sequence.step + 1

    async def _append(
        self, ids: Sequence[int], extent: int, sampling: SamplingParams | None, output: OutputOptions, chunk: int
    ) -> list[StepResult]:
        """Rows of a prompt, chunk by chunk: see `prefill`."""
        chunk = chunk or self._chunk_rows(len(ids))
        in_flight = max(2, PREFILL_BYTES // (chunk * row_bytes(self.options.codec, self.route[0].peer.hidden_size)))
        results: list[StepResult] = []
        first, starts = self._sequence.step + 1, range(0, len(ids), chunk)
        for sent, start in enumerate(starts):
            if sent - len(results) >= in_flight:
                results.append(await self._steps.result(first + len(results)))
            rows = ids[start : start + chunk]
            sample = start == starts[-1] and sampling is not None
            await self._send(rows, (), output, prefill=True, sample=sample, sampling=sampling, extent=extent)
            self.ids.extend(rows)
            self._sequence.prompt_length = len(self.ids)
        while len(results) < len(starts):
            results.append(await self._steps.result(first + len(results)))
        return results

    async def step(
        self, tree: DraftTree, sampling: SamplingParams | None = None, output: OutputOptions | None = None
    ) -> StepResult:
        """Verify a tree whose row 0 is the last emitted token; the accepted rows become part of the session.

        Raises PeerError, NoRoute.
        """
        output = output or OutputOptions()
        await self._fit(len(self.ids) + 1)
        if tree.height and tree.height > (room := self.room(len(self.ids) + 1)):
            raise ValueError(f"a tree of {tree.height} levels goes over a border of the model's rope: {room} fit here")
        parents = () if tree.is_chain else tree.parents
        await self._send(tree.ids, parents, output, prefill=False, sample=True, sampling=sampling)
        result = await self._steps.result(self._sequence.step)
        if self.options.local_ends:
            await self._draw(result, tree, output)
        self._sequence.take(tree, result)
        return result

    async def _send(
        self,
        ids: Sequence[int],
        parents: Sequence[int],
        output: OutputOptions,
        *,
        prefill: bool,
        sample: bool,
        sampling: SamplingParams | None,
        extent: int = 0,
    ) -> None:
        if self._pipeline.draining:
            await self._steps.hand_over()
        step = self._sequence.next_step(
            ids,
            parents,
            output,
            prefill=prefill,
            sample=sample,
            sampling=sampling,
            client_draws=self.options.local_ends is not None,
            extent=extent,
        )
        await self._steps.send(step)

    async def _draw(self, result: StepResult, tree: DraftTree | None, output: OutputOptions) -> None:
        """Say here what the last stage would have said."""
        assert self.options.local_ends
        assert result.hidden is not None
        verdict, logits = await self.options.local_ends.draw(
            result.hidden,
            tree,
            self._sequence.sampling or SamplingParams(),
            TokenHistory(self.ids, self._sequence.prompt_length),
            output.top_logprobs,
            self.reshape,
        )
        result.logits = np.stack(logits) if output.logits else None
        result.accepted, result.next_token = verdict.accepted, verdict.next_token
        result.logprobs = [row.message() for row in verdict.logprobs]

    def _chunk_rows(self, rows: int) -> int:
        """Enough chunks to keep every peer busy, none so small that its fixed cost shows."""
        if len(self.route) == 1:
            return self.max_rows
        return min(self.max_rows, max(64, min(512, -(-rows // 8))))
