"""A session: one sequence's state along one route of peers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np
from numpy.typing import NDArray

from ..protocol import petal_pb2 as pb
from ..protocol.codec import row_bytes
from ..protocol.limits import PROTOCOL
from ..protocol.sampling import SamplingParams
from ..protocol.tree import DraftTree, chain
from .route import Route, context_of
from .stream import PeerError, PeerStream

OPEN_TIMEOUT_S = 15.0
Channels = Callable[[str], grpc.aio.Channel]


@dataclass(frozen=True)
class SessionOptions:
    """What a session asks of its peers when it opens."""

    reserve_tokens: int
    codec: pb.Codec = pb.FLOAT32
    exact: bool = False
    priority: int = 0
    step_timeout_s: float = 120.0


@dataclass(frozen=True)
class Want:
    """What the tail returns beside tokens."""

    top_logprobs: int = 0
    logits: bool = False
    trace: bool = False

    def message(self) -> pb.Want:
        return pb.Want(top_logprobs=self.top_logprobs, logits=self.logits)


@dataclass
class StepResult:
    """The tail's answer: accepted rows (row 0 first) and the token behind the last of them."""

    accepted: list[int] = field(default_factory=list)
    next_token: int | None = None
    logprobs: list[pb.RowLogprobs] = field(default_factory=list)
    hops: list[pb.Hop] = field(default_factory=list)
    logits: NDArray[np.float32] | None = None
    tree: DraftTree | None = None

    @property
    def path_ids(self) -> list[int]:
        """Tokens that the accepted path emitted before `next_token`."""
        return [self.tree.ids[row] for row in self.accepted[1:]] if self.tree else []


class Session:
    """Sends steps along a route. `ids` are the tokens whose rows every peer holds, once the next step has told them."""

    def __init__(self, route: Route, channels: Channels, client_id: bytes, options: SessionOptions) -> None:
        self.route = route
        self.options = options
        self.ids: list[int] = []
        self.max_rows = 0
        self._channels = channels
        self._client_id = client_id
        self._session_id = secrets.token_bytes(16)
        self._inbox: asyncio.Queue[tuple[PeerStream, pb.PeerFrame | PeerError]] = asyncio.Queue()
        self._streams: list[PeerStream] = []
        self._epoch = 1
        self._step = 0
        self._commit: list[int] = []
        self._rewind: int | None = None
        self._sampling: SamplingParams | None = None

    # Opening and closing.

    async def open(self) -> None:
        """Reserve on every peer and join the links, or release all and raise PeerError."""
        await self._open(b"")

    async def _open(self, fork_of: bytes) -> None:
        self._streams = [
            PeerStream(stop.name, stop.peer.peer_id, self._channels(stop.peer.addresses[0]), self._deliver)
            for stop in self.route
        ]
        try:
            opened = await asyncio.gather(
                *(stream.open(self._open_message(i, fork_of), OPEN_TIMEOUT_S) for i, stream in enumerate(self._streams))
            )
            self.max_rows = min(reply.max_rows for reply in opened)
            await self._join([reply.link_token for reply in opened])
        except BaseException:
            self.close()
            raise

    def _open_message(self, index: int, fork_of: bytes) -> pb.Open:
        stop = self.route[index]
        return pb.Open(
            session_id=self._session_id,
            client_id=self._client_id,
            protocol=PROTOCOL,
            required_features=["tree", "exact"] if self.options.exact else ["tree"],
            model_digest=stop.peer.model_digest,
            start=stop.blocks.start,
            end=stop.blocks.stop,
            reserve_tokens=self.options.reserve_tokens,
            codec=self.options.codec,
            route_epoch=self._epoch,
            fork_of=fork_of,
            exact=self.options.exact,
            priority=self.options.priority,
        )

    async def _join(self, tokens: Sequence[bytes]) -> None:
        """Let each peer dial the next one, with the token that the next one gave out."""
        for stream, stop, token in zip(self._streams, self.route[1:], tokens[1:], strict=False):
            link = pb.LinkTo(peer_id=stop.peer.peer_id, token=token, route_epoch=self._epoch)
            await stream.send(pb.ClientFrame(link_to=link))
        for _ in self.route[1:]:
            stream, frame = await self._receive()
            if not frame.HasField("linked"):
                raise _unexpected(stream, frame)

    def close(self) -> None:
        for stream in self._streams:
            stream.close()

    async def __aenter__(self) -> Session:
        if not self._streams:
            await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def fork(self) -> Session:
        """A session with the same state that shares this one's pages on every peer."""
        child = Session(self.route, self._channels, self._client_id, self.options)
        child._epoch = self._epoch
        await child._open(self._session_id)
        child.ids = list(self.ids)
        child._step, child._commit = self._step, list(self._commit)
        child._rewind, child._sampling = self._rewind, self._sampling
        return child

    # Steps.

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens; peers hear of it with the next step."""
        if not 0 <= length <= len(self.ids):
            raise ValueError(f"cannot rewind to {length}: the session holds {len(self.ids)} tokens")
        if length < len(self.ids):
            self._rewind = length if self._rewind is None else min(length, self._rewind)
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
        while len(results) < len(starts):
            results.append(await self._result(first + len(results)))
        if want.logits:
            results[-1].logits = np.concatenate([r.logits for r in results if r.logits is not None])
        return results[-1]

    async def step(
        self, tree: DraftTree, sampling: SamplingParams | None = None, want: Want | None = None
    ) -> StepResult:
        """Verify a tree whose row 0 is the last emitted token; the accepted rows become part of the session."""
        parents = () if tree.parents == chain(len(tree)) else tree.parents
        await self._send(tree.ids, parents, prefill=False, sample=True, sampling=sampling, want=want or Want())
        result = await self._result(self._step)
        self._commit, result.tree = result.accepted, tree
        self.ids.extend(tree.ids[row] for row in result.accepted)
        return result

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
        self._step += 1
        message = pb.Step(
            step=self._step,
            route_epoch=self._epoch,
            base=len(self.ids),
            commit=self._commit,
            rewind=self._rewind,
            ids=ids,
            parents=parents,
            prefill=prefill,
            sample=sample,
            want=want.message(),
            trace=want.trace,
        )
        self._commit, self._rewind = [], None
        frame = pb.ClientFrame(step=message)
        if len(self._streams) > 1:
            await self._streams[0].send(frame)
        if sampling is not None and sampling != self._sampling:
            message.sampling.CopyFrom(sampling_message(sampling))
            self._sampling = sampling
            frame = pb.ClientFrame(step=message)
        await self._streams[-1].send(frame)

    async def _result(self, step: int) -> StepResult:
        result = StepResult()
        logits = bytearray()
        while True:
            stream, frame = await self._receive()
            if not frame.HasField("result"):
                raise _unexpected(stream, frame)
            part = frame.result
            if part.step != step:
                continue  # the answer to a repeat that was no longer needed
            if part.sampled:
                result.accepted, result.next_token = list(part.accepted), part.next_token
                result.logprobs = list(part.logprobs)
            result.hops.extend(part.hops)
            logits += part.logits
            if part.last_part:
                break
        if logits:
            result.logits = np.frombuffer(bytes(logits), np.float32).reshape(-1, self.vocab_size)
        return result

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

    # Frames from peers.

    def _deliver(self, stream: PeerStream, frame: pb.PeerFrame | PeerError) -> None:
        self._inbox.put_nowait((stream, frame))

    async def _receive(self) -> tuple[PeerStream, pb.PeerFrame]:
        try:
            stream, frame = await asyncio.wait_for(self._inbox.get(), self.options.step_timeout_s)
        except asyncio.TimeoutError:
            raise PeerError("route", grpc.StatusCode.DEADLINE_EXCEEDED, "no answer in time") from None
        if isinstance(frame, PeerError):
            raise frame
        if frame.HasField("fault"):
            fault = frame.fault
            reason = f"cannot reach peer {fault.peer_id[-8:]}: {fault.reason}"
            raise PeerError(stream.name, grpc.StatusCode.UNAVAILABLE, reason, fault.peer_id)
        return stream, frame


def _unexpected(stream: PeerStream, frame: pb.PeerFrame) -> PeerError:
    return stream.error(grpc.StatusCode.INTERNAL, f"sent an unexpected {frame.WhichOneof('kind')} frame")


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
