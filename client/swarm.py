"""`SwarmModel`: a model that a swarm runs, with transformers' argument names."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from typing import Any, Protocol

from ..protocol.checkpoint.layout import CheckpointError
from ..protocol.checkpoint.open import open_checkpoint
from ..protocol.checkpoint.tokenizer import Tokenizer
from ..protocol.directory.directory import Directory
from ..protocol.trust.channels import Channels
from ..protocol.wire.codec import CODECS
from .chat import Chat
from .drafting.budget import BudgetController
from .drafting.registry import DrafterShelf
from .drafting.rounds import Speculation
from .event_loop import BackgroundLoop
from .generation import GenerationConfig, Piece, common_prefix, config_of, for_sequence, generate
from .routing.connect import enter
from .routing.peers import ConnectError, KnownPeers
from .routing.route import NoRoute, Route, choose_route, context_of
from .routing.trusted_ends import TrustedEnds
from .session.local_ends_registry import HeadShelf
from .session.pipeline import SessionOptions
from .session.session import Session
from .session.stream import PeerError

# For blocks that lose their last peer in mid-generation.
WAIT_S = 30.0
# How soon a revoked peer's streams are cut once this client has heard of it.
SWEEP_S = 2.0
# Rows a draft tree may add behind prompt and answer.
TREE_ROOM = 128
# Shorter beginnings are not worth the wait until the trunk is there.
SHARED_PREFIX = 32
Prompt = str | Sequence[int]


class Streamer(Protocol):
    """transformers' streamer: `put` gets token ids as they come, `end` closes."""

    def put(self, value: Any) -> None: ...
    def end(self) -> None: ...


class AsyncSwarmModel:
    """The asynchronous core; every method belongs to the event loop that called `connect`."""

    def __init__(
        self,
        name: str,
        digest: bytes | None,
        directory: Directory,
        ends: TrustedEnds,
        tokenizer: Tokenizer | None,
        codec: str,
        exact: bool,
        allow_mixed: bool,
        wait_s: float,
    ) -> None:
        if codec not in CODECS:
            raise ValueError(f"codec is one of {', '.join(CODECS)}, not {codec!r}")
        self.name = name
        self.tokenizer = tokenizer
        self._directory = directory
        self._codec = CODECS[codec]
        self._exact, self._mixed = exact, allow_mixed
        self._wait_s = wait_s
        self._known = KnownPeers(directory, ends.trust, name, digest, ends.limit)
        self._channels = Channels(ends.trust)
        self.ends = ends
        self._membership: asyncio.Task[None] | None = None
        self._drafters: DrafterShelf | None = None
        self._heads: HeadShelf | None = None
        self._budgets: dict[tuple[str, ...], BudgetController] = {}

    @classmethod
    async def connect(
        cls,
        model: str,
        initial_peers: Sequence[str] = (),
        *,
        join: str | None = None,
        tokenizer: Tokenizer | None = None,
        codec: str = "float32",
        exact: bool = False,
        allow_mixed: bool = False,
        local_head: bool = False,
        trusted_ends: str | Collection[str] = (),
        wait_s: float | None = None,
    ) -> AsyncSwarmModel:
        """Find the model's peers. `initial_peers` are gRPC host:port of any peers, or libp2p multiaddrs.

        `join` is an invitation to a private swarm, or a file that holds it, in place of `initial_peers`.
        `exact` keeps to peers that promise the same bits for a row in any batch, tree or chunk, by one arithmetic.
        `allow_mixed` lets a route mix dtypes and quantizations where no one kind has every block; by default it does
        not, since the text would depend on the route.
        `local_head` embeds and draws on this machine, with `logits_processor`s of one's own; peers get embeddings
        in place of token ids. It needs the checkpoint, torch and transformers.
        `trusted_ends` are labels, such as lab=oxford, that the peers of the first and the last block must have.
        Waits up to `wait_s` seconds for blocks without a peer: by default not at all to begin with, and WAIT_S where
        they are lost while it generates. Raises ConnectError.
        """
        if exact and allow_mixed:
            raise ValueError("exact and allow_mixed contradict each other: a mixed route is not exact")
        name, digest = model, None
        try:
            with await asyncio.to_thread(open_checkpoint, model) as checkpoint:
                name, digest = checkpoint.name, bytes.fromhex(checkpoint.digest())
                with contextlib.suppress(CheckpointError):  # token ids still work
                    tokenizer = tokenizer or checkpoint.tokenizer()
        except CheckpointError as error:
            if tokenizer is None:
                raise ConnectError(f"no tokenizer for {model}: {error}") from error
        trust, directory = await enter(initial_peers, join)
        ends = TrustedEnds(trust, frozenset([trusted_ends] if isinstance(trusted_ends, str) else trusted_ends))
        wait = WAIT_S if wait_s is None else wait_s
        self = cls(name, digest, directory, ends, tokenizer, codec, exact, allow_mixed, wait)
        try:
            await self._wait_for_route(wait_s or 0.0)
            if local_head:
                self._heads = HeadShelf(model, exact)
                await self._heads.head_for(await self.route())
            self._known.keep_fresh()
            self._membership = asyncio.create_task(self._keep_trust())
        except BaseException:
            await self.close()
            raise
        return self

    async def close(self) -> None:
        if self._membership:
            self._membership.cancel()
        self._known.close()
        await self._directory.close()
        await self._channels.close()

    async def _keep_trust(self) -> None:
        """Renew what this client shows; leave peers that are not trusted any more, and let sessions go on elsewhere."""
        renewing = asyncio.create_task(self._channels.trust.keep(None))
        try:
            while True:
                await asyncio.sleep(SWEEP_S)
                self._channels.sweep()
        finally:
            renewing.cancel()

    async def route(self, reserve_tokens: int = 0) -> Route:
        """The route that a new session would take. Raises NoRoute, ConnectError."""
        await self._known.look()
        known = self._known
        try:
            return choose_route(known.usable(), known.rtt_s, reserve_tokens, exact=self._exact, mixed=self._mixed)
        except NoRoute as error:
            limits = filter(None, [str(self.ends) if self.ends.labels else "", known.left_out])
            raise NoRoute("; ".join([str(error), *limits])) from None

    async def open_session(self, reserve_tokens: int, wait_s: float | None = None) -> Session:
        """Open along the best route; where peers are busy or missing, try again with jitter, for `wait_s` seconds.

        Reserves no more than the model's context and room for a tree. Raises PeerError, NoRoute.
        """
        deadline = time.monotonic() + (self._wait_s if wait_s is None else wait_s)
        while True:
            try:
                route = await self.route(reserve_tokens)
                usable = min(reserve_tokens, context_of(route) + TREE_ROOM)
                head = await self._heads.head_for(route) if self._heads else None
                options = SessionOptions(usable, self._codec, self._exact, self._mixed, wait_s=self._wait_s, head=head)
                session = Session(route, self._known, self._channels, options)
                await session.open()
                self._known.pin(route)
                return session
            except PeerError as error:
                if not (error.busy or error.gone) or time.monotonic() > deadline:
                    raise
                if error.gone and error.peer_id:
                    self._known.ban(error.peer_id)
                await asyncio.sleep(random.uniform(0.1, 0.5) if error.busy else 0)
            except NoRoute:
                if time.monotonic() > deadline:
                    raise
                await self._known.try_banned()
                await asyncio.sleep(random.uniform(0.1, 0.5))

    async def speculation(self, config: GenerationConfig, session: Session) -> Speculation:
        """Drafting for one sequence, as `config` asks; what was learned about a route serves all its sessions."""
        self._drafters = self._drafters or DrafterShelf(self.tokenizer, self._known.digest or b"")
        drafters = await self._drafters.drafters(config.drafter)
        key = (*(type(drafter).__name__ for drafter in drafters), *(stop.peer.peer_id for stop in session.route))
        return Speculation(drafters, self._budgets.setdefault(key, BudgetController()), config.budget)

    def config(self, **settings: Any) -> GenerationConfig:
        """See `config_of`; the model's own end-of-text ids are the default."""
        eos = frozenset(self.tokenizer.eos_ids) if self.tokenizer else frozenset()
        return config_of(default_eos=eos, **settings)

    def encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return [int(token) for token in prompt]
        if self.tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer; give token ids")
        return self.tokenizer.encode(prompt)

    async def stream(self, prompt: Prompt, **settings: Any) -> AsyncIterator[Piece]:
        """Pieces of the answer as they come."""
        config = self.config(**settings)
        ids = self.encode(prompt)
        session = await self.open_session(len(ids) + config.max_new_tokens + TREE_ROOM)
        try:
            speculation = await self.speculation(config, session)
            async for piece in generate(session, ids, config, self.tokenizer, speculation):
                yield piece
        finally:
            session.close()

    async def answers(self, prompts: Sequence[Prompt], n: int, config: GenerationConfig) -> list[list[list[Piece]]]:
        """`n` answers to each prompt. What all prompts begin with is computed once; their sessions fork behind it."""
        encoded = [self.encode(prompt) for prompt in prompts]
        reserve = max(map(len, encoded)) + config.max_new_tokens + TREE_ROOM
        shared = shared_prefix(encoded) if len(encoded) * n > 1 else []
        trunk = None
        if len(shared) >= (1 if n > 1 else SHARED_PREFIX):
            trunk = await self.open_session(reserve)
        try:
            if trunk:
                await trunk.prefill(shared)
            work = [self._answer(ids, for_sequence(config, i), trunk, reserve) for ids in encoded for i in range(n)]
            answers = await asyncio.gather(*work)
        finally:
            if trunk:
                trunk.close()
        return [answers[i : i + n] for i in range(0, len(answers), n)]

    async def _answer(
        self, ids: list[int], config: GenerationConfig, trunk: Session | None, reserve: int
    ) -> list[Piece]:
        session = await self._branch(trunk, reserve)
        try:
            speculation = await self.speculation(config, session)
            return [piece async for piece in generate(session, ids, config, self.tokenizer, speculation)]
        finally:
            session.close()

    async def _branch(self, trunk: Session | None, reserve: int) -> Session:
        """A fork of the trunk; a session of its own, waited for, where the trunk's peers are full or gone."""
        if trunk:
            try:
                return await trunk.fork()
            except PeerError as error:
                if not (error.busy or error.gone):
                    raise
        return await self.open_session(reserve)

    async def generate(
        self, inputs: Any, *, num_return_sequences: int = 1, streamer: Streamer | None = None, **settings: Any
    ) -> Any:
        """As transformers' `generate`: ids in, prompt + answer ids out; text in, the answer's text out.

        `inputs` is one prompt or a list: text, token ids, or a tensor [batch, length] (then a tensor comes back,
        padded with the end-of-text id). With `num_return_sequences` above 1 every prompt gives that many results.
        """
        config = self.config(**settings)
        prompts, single = _prompts(inputs)
        if streamer is not None:
            if len(prompts) != 1 or num_return_sequences != 1:
                raise ValueError("a streamer takes one prompt and one sequence")
            groups = [[await self._stream_to(streamer, prompts[0], settings)]]
        else:
            groups = await self.answers(prompts, num_return_sequences, config)
        results = [_result(prompt, pieces) for prompt, group in zip(prompts, groups, strict=True) for pieces in group]
        if type(inputs).__module__.partition(".")[0] == "torch":
            return _tensor_like(inputs, results, pad=min(self.config().eos_token_ids, default=0))
        return results[0] if single and num_return_sequences == 1 else results

    async def _stream_to(self, streamer: Streamer, prompt: Prompt, settings: dict[str, Any]) -> list[Piece]:
        pieces = []
        streamer.put(self.encode(prompt))
        async for piece in self.stream(prompt, **settings):
            pieces.append(piece)
            for token in piece.ids:
                streamer.put([token])
        streamer.end()
        return pieces

    async def _wait_for_route(self, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                await self.route()
                return
            except NoRoute as error:
                if time.monotonic() >= deadline:
                    raise ConnectError(str(error)) from error
            await asyncio.sleep(0.5)


class SwarmModel:
    """A model that a swarm runs.

    >>> model = SwarmModel.connect("demo", initial_peers=["127.0.0.1:31337"])
    >>> model.generate("The capital of France is", max_new_tokens=8)

    Synchronous methods work anywhere; their twins with a leading `a` are awaited in any event loop.
    """

    def __init__(self, core: AsyncSwarmModel, loop: BackgroundLoop) -> None:
        self._core = core
        self._loop = loop

    @classmethod
    def connect(cls, model: str, initial_peers: Sequence[str] = (), **options: Any) -> SwarmModel:
        """See AsyncSwarmModel.connect. Raises ConnectError."""
        loop = BackgroundLoop()
        try:
            return cls(loop.run(AsyncSwarmModel.connect(model, initial_peers, **options)), loop)
        except BaseException:
            loop.stop()
            raise

    @property
    def name(self) -> str:
        return self._core.name

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._core.tokenizer

    def generate(self, inputs: Any, **settings: Any) -> Any:
        """See AsyncSwarmModel.generate."""
        return self._loop.run(self._core.generate(inputs, **settings))

    async def agenerate(self, inputs: Any, **settings: Any) -> Any:
        return await self._loop.delegate(self._core.generate(inputs, **settings))

    def stream(self, prompt: Prompt, **settings: Any) -> Iterator[Piece]:
        """Pieces of the answer as they come: `for piece in model.stream("Hi"): print(piece.text, end="")`."""
        return self._loop.iterate(self._core.stream(prompt, **settings))

    def astream(self, prompt: Prompt, **settings: Any) -> AsyncIterator[Piece]:
        return self._loop.delegate_iteration(self._core.stream(prompt, **settings))

    def chat(self, **options: Any) -> Chat:
        """A conversation whose session stays open between turns."""
        return Chat(self._core, self._loop, **options)

    def route(self) -> Route:
        """The route that a new session would take. Raises NoRoute."""
        return self._loop.run(self._core.route())

    @property
    def ends(self) -> TrustedEnds:
        """Whom the first and the last block are left to."""
        return self._core.ends

    def close(self) -> None:
        self._loop.run(self._core.close())
        self._loop.stop()

    def __enter__(self) -> SwarmModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """What all prompts begin with; every prompt keeps at least one token of its own, whose row predicts the first."""
    shared = prompts[0][:-1]
    for prompt in prompts[1:]:
        shared = shared[: common_prefix(shared, prompt[:-1])]
    return list(shared)


def _prompts(inputs: Any) -> tuple[list[Prompt], bool]:
    """Prompts, and whether there was just one, not in a list."""
    if isinstance(inputs, str):
        return [inputs], True
    items = inputs.tolist() if hasattr(inputs, "tolist") else list(inputs)
    if items and isinstance(items[0], int):
        return [items], True
    if not items:
        raise ValueError("there is no prompt")
    return items, False


def _result(prompt: Prompt, pieces: list[Piece]) -> str | list[int]:
    if isinstance(prompt, str):
        return "".join(piece.text for piece in pieces)
    return [*prompt, *(token for piece in pieces for token in piece.ids)]


def _tensor_like(inputs: Any, rows: Sequence[Any], pad: int) -> Any:
    width = max(map(len, rows))
    padded = [[*row, *[pad] * (width - len(row))] for row in rows]
    return inputs.new_tensor(padded)
