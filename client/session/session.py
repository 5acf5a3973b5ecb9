"""A session: one sequence's state along a route of peers, whoever of them fails meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc
import numpy as np
from numpy.typing import NDArray

from ...protocol import petal_pb2 as pb
from ...protocol.trust.channels import Channels
from ...protocol.wire.codec import CodecError, decode, row_bytes
from ...protocol.wire.sampling import SamplingParams
from ...protocol.wire.tree import DraftTree, chain
from ...protocol.wire.verification import TokenHistory
from ..routing.route import NoRoute, Route, context_of, is_full, same_kinds
from .failover import Failover, PeerFinder, move, plan
from .pipeline import OpenRoute, SessionOptions, Standpoint
from .result import StepResult, Want
from .stream import PeerError

if TYPE_CHECKING:
    from .local_ends import LogitsProcessor

__all__ = ["Session", "StepResult", "Want", "sampling_message"]

# A step that fails on so many peers, one after the other, is itself at fault.
MOST_FAILOVERS = 8


class Session:
    """Sends steps along a route. `ids` are the tokens whose rows every peer holds, once the next step has told them.

    Where a peer fails, another takes its place and the session goes on; `take_events` says so.
    """

    def __init__(self, route: Route, finder: PeerFinder, channels: Channels, options: SessionOptions) -> None:
        self.route = route
        self.options = options
        self.ids: list[int] = []
        self._finder = finder
        self._channels = channels
        # Applied before each draw, where this machine holds the head.
        self.logits_processors: Sequence[LogitsProcessor] = ()
        self._line = OpenRoute(channels, options)
        self._step = 0
        self._commit: list[int] = []
        self._rewind: int | None = None
        self._sampling: SamplingParams | None = None
        self._prompt_length = 0
        # Steps without an answer yet, oldest first; a change of route sends them again.
        self._unanswered: dict[int, pb.Step] = {}
        # Changes of route, until the answer after them tells how long they took.
        self._moves: list[tuple[str, tuple[str, ...], bool]] = []
        self._events: list[Failover] = []
        self._failovers = 0
        self._waiting_since = 0.0

    @property
    def max_rows(self) -> int:
        """Rows that the route's peers take in a step."""
        return self._line.max_rows

    @property
    def max_nodes(self) -> int:
        """Rows of a tree below row 0; none where a peer knows no trees."""
        return self._line.max_nodes

    # Opening and closing.

    async def open(self) -> None:
        """Reserve on every peer and join the links, or release all and raise PeerError."""
        await self._line.open(self.route)

    def close(self) -> None:
        self._line.close()

    async def __aenter__(self) -> Session:
        if not self._line.legs:
            await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def fork(self) -> Session:
        """A session with the same state that shares this one's pages on every peer."""
        child = Session(self.route, self._finder, self._channels, self.options)
        await child._line.open(self.route, fork_of=self._line.session_id)
        child.ids = list(self.ids)
        child._step, child._commit = self._step, list(self._commit)
        child._rewind, child._sampling = self._rewind, self._sampling
        child._prompt_length = self._prompt_length
        return child

    def take_events(self) -> list[Failover]:
        """What happened to the route since the last call."""
        events, self._events = self._events, []
        return events

    # Steps.

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; peers hear of it with the next step."""
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cannot rewind to {length}: the session holds {len(self.ids)} tokens")
        if length < len(self.ids):
            self._rewind = length if self._rewind is None else min(length, self._rewind)
            self._prompt_length = min(self._prompt_length, length)
            del self.ids[length:]

    async def prefill(
        self, ids: Sequence[int], sampling: SamplingParams | None = None, want: Want | None = None, chunk: int = 0
    ) -> StepResult:
        """Append prompt tokens, in chunks that follow each other through the route without waiting.

        With `sampling` the tail draws the next token. Returns the last chunk's answer; logits are of all rows asked.
        """
        if not ids:
            raise ValueError("there is nothing to prefill")
        want = want or Want()
        chunk = chunk or self._chunk_rows(len(ids))
        starts = range(0, len(ids), chunk)
        depth = self._chunks_in_flight(chunk)
        results: list[StepResult] = []
        first = self._step + 1
        for sent, start in enumerate(starts):
            if sent - len(results) >= depth:
                results.append(await self._result(first + len(results)))
            last = start == starts[-1]
            piece = ids[start : start + chunk]
            await self._send(
                piece, (), prefill=True, sample=last and sampling is not None, sampling=sampling, want=want
            )
            self.ids.extend(piece)
            self._prompt_length = len(self.ids)
        while len(results) < len(starts):
            results.append(await self._result(first + len(results)))
        answer = results[-1]
        if sampling is not None and self.options.head:
            await self._draw(answer, None, want)
        if want.logits:
            answer.logits = np.concatenate([r.logits for r in results if r.logits is not None])
        if want.hidden:
            answer.hidden = np.concatenate([r.hidden for r in results if r.hidden is not None])
        return answer

    async def step(
        self, tree: DraftTree, sampling: SamplingParams | None = None, want: Want | None = None
    ) -> StepResult:
        """Verify a tree whose row 0 is the last emitted token; the accepted rows become part of the session."""
        parents = () if tree.parents == chain(len(tree)) else tree.parents
        await self._send(tree.ids, parents, prefill=False, sample=True, sampling=sampling, want=want or Want())
        result = await self._result(self._step)
        if self.options.head:
            await self._draw(result, tree, want or Want())
        self._commit, result.tree = result.accepted, tree
        self.ids.extend(tree.ids[row] for row in result.accepted)
        return result

    async def _draw(self, result: StepResult, tree: DraftTree | None, want: Want) -> None:
        """Say here what the tail would have said."""
        assert self.options.head
        assert result.hidden is not None
        verdict = await self.options.head.draw(
            result.hidden,
            tree,
            self._sampling or SamplingParams(),
            TokenHistory(self.ids, self._prompt_length),
            want.top_logprobs,
            self.logits_processors,
        )
        result.accepted, result.next_token = verdict.accepted, verdict.next_token
        result.logprobs = [row.message() for row in verdict.logprobs]

    async def _send(
        self,
        ids: Sequence[int],
        parents: Sequence[int],
        *,
        prefill: bool,
        sample: bool,
        sampling: SamplingParams | None,
        want: Want,
    ) -> None:
        if not self._unanswered:
            self._waiting_since = time.monotonic()
        await self._hand_over()
        self._step += 1
        local = self.options.head is not None
        message = pb.Step(
            step=self._step,
            base=len(self.ids),
            commit=self._commit,
            rewind=self._rewind,
            ids=ids,
            parents=parents,
            prefill=prefill,
            sample=sample and not local,
            want=pb.Want(
                top_logprobs=0 if local else want.top_logprobs,
                logits=want.logits,
                hidden=want.hidden or (sample and local),
            ),
            trace=want.trace,
        )
        if sampling is not None and sampling != self._sampling:
            message.sampling.CopyFrom(sampling_message(sampling))
            self._sampling = sampling
        self._commit, self._rewind = [], None
        self._unanswered[self._step] = message
        try:
            await self._transmit(message)
        except PeerError as error:
            await self._fail_over(error)

    async def _transmit(self, message: pb.Step) -> None:
        """To the head, and to the tail with what only the tail needs; a new tail needs all of it.

        Where this machine holds the head, the tail needs but the header, and the head peer embeddings.
        """
        head, tail = self._line.legs[0], self._line.legs[-1]
        message.route_epoch = self._line.epoch
        to_head, to_tail = pb.ClientFrame(step=message), pb.ClientFrame(step=message)
        to_head.step.ClearField("sampling")
        if self.options.head:
            await self.options.head.embed(to_head.step, self.options.codec)
            to_tail.step.CopyFrom(to_head.step)
            if head is not tail:
                to_tail.step.ClearField("embeddings")
                to_tail.step.parents[:] = message.parents or chain(len(message.ids))
        elif not tail.whole:
            prompt_length = min(self._prompt_length, message.base)
            to_tail.step.history.CopyFrom(pb.History(ids=self.ids[: message.base], prompt_length=prompt_length))
            if self._sampling:
                to_tail.step.sampling.CopyFrom(sampling_message(self._sampling))
        if head is not tail:
            await self._line.send(head, to_head)
        await self._line.send(tail, to_tail)

    async def _result(self, step: int) -> StepResult:
        while True:
            try:
                result = await self._answer(step)
                self._check_hidden(result, self._unanswered[step])
            except PeerError as error:
                await self._fail_over(error)
                continue
            del self._unanswered[step]
            self._progress()
            return result

    async def _answer(self, step: int) -> StepResult:
        result = StepResult()
        logits, hidden = bytearray(), bytearray()
        while True:
            part = await self._line.result()
            if part.step != step:
                continue  # the answer to a repeat that was no longer needed
            if part.sampled:
                result.accepted, result.next_token = list(part.accepted), part.next_token
                result.logprobs = list(part.logprobs)
            result.hops.extend(part.hops)
            logits += part.logits
            hidden += part.hidden
            if part.last_part:
                break
        if logits:
            result.logits = np.frombuffer(bytes(logits), np.float32).reshape(-1, self.vocab_size)
        if hidden:
            result.hidden = self._decoded(bytes(hidden))
        return result

    def _decoded(self, hidden: bytes) -> NDArray[np.float32]:
        """Hidden states [rows, d] as the tail sent them. Raises PeerError for a tail that sends anything else."""
        try:
            return decode(self.options.codec, hidden, self.route[-1].peer.hidden_size)
        except CodecError as error:
            raise self._lying_tail(f"sent hidden states that are none: {error}") from error

    def _check_hidden(self, result: StepResult, asked: pb.Step) -> None:
        rows = 0 if result.hidden is None else len(result.hidden)
        if asked.want.hidden and rows != len(asked.ids):
            raise self._lying_tail(f"sent hidden states of {rows} rows, not {len(asked.ids)}")

    def _lying_tail(self, reason: str) -> PeerError:
        tail = self._line.legs[-1]
        return tail.fail(tail.stream.error(grpc.StatusCode.DATA_LOSS, reason))

    # Failover.

    async def _fail_over(self, error: PeerError) -> None:
        """Find a route without the peers that failed, and send what has no answer again. Raises NoRoute, PeerError."""
        while True:
            self._failovers += 1
            if not error.replaceable or self._failovers > MOST_FAILOVERS:
                raise error
            try:
                await self._move(str(error))
                return
            except PeerError as another:
                error = another

    async def _hand_over(self) -> None:
        """Move away from peers that are about to leave, where others can take over."""
        leaving = [leg for leg in self._line.legs if leg.draining and not leg.failed]
        if not leaving:
            return
        try:
            full = {r.peer_id for r in self._finder.reachable() if is_full(r, self.options.reserve_tokens)}
            without = full | {leg.stop.peer.peer_id for leg in leaving}
            plan(self._line.legs, self.route, self._finder, self.options, without)
            await self._move(f"peer {leaving[0].stop.name} is leaving")
        except NoRoute:
            return  # it may still finish what runs
        except PeerError as error:
            await self._fail_over(error)

    async def _move(self, fault: str) -> None:
        """Change the route, and send the steps that have no answer along the new one. Raises NoRoute, PeerError."""
        before = {leg.stop.key for leg in self._line.legs if not leg.failed}
        former = self.route
        self.route = await move(self._line, former, self._finder, self.options, self._standpoint())
        others = tuple(stop.name for stop in self.route if stop.key not in before)
        self._moves.append((fault, others, same_kinds(former, self.route)))
        # Commit and rewind are part of where the peers stand now.
        self._commit, self._rewind = [], None
        for message in self._unanswered.values():
            message.ClearField("commit")
            message.ClearField("rewind")
            await self._transmit(message)

    def _standpoint(self) -> Standpoint:
        """Behind the last step that was answered."""
        if not self._unanswered:
            return Standpoint(self._step, self.ids, self._commit)
        first = next(iter(self._unanswered.values()))
        return Standpoint(first.step - 1, self.ids[: first.base], list(first.commit))

    def _progress(self) -> None:
        """An answer came: the whole route is well."""
        now = time.monotonic()
        pause_s = now - self._waiting_since
        self._events += [Failover(fault, others, pause_s, alike) for fault, others, alike in self._moves]
        self._moves.clear()
        self._waiting_since = now
        self._failovers = 0
        self._line.settle()

    @property
    def vocab_size(self) -> int:
        return self.route[0].peer.vocab_size

    @property
    def context_length(self) -> int:
        return context_of(self.route)

    def _chunk_rows(self, rows: int) -> int:
        """Enough chunks to keep every peer busy, none so small that its fixed cost shows."""
        if len(self.route) == 1:
            return self.max_rows
        return min(self.max_rows, max(64, min(512, -(-rows // 8))))

    def _chunks_in_flight(self, chunk: int) -> int:
        size = chunk * row_bytes(self.options.codec, self.route[0].peer.hidden_size)
        return max(2, (8 << 20) // size)


def sampling_message(params: SamplingParams) -> pb.Sampling:
    return pb.Sampling(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        sequence=params.sequence,
    )
