"""`SwarmModel`: a model that a swarm runs, with transformers' argument names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..protocol.checkpoint.generation_defaults import GenerationDefaults
from ..protocol.checkpoint.layout import CheckpointError
from ..protocol.checkpoint.open import open_checkpoint
from ..protocol.checkpoint.tokenizer import Tokenizer
from ..protocol.directory.own_weights import OwnWeights
from ..protocol.wire.codec import CODECS
from .arguments import SettingsError
from .batch import Answer, Batch
from .chat import AsyncChat, Chat
from .config import GenerationConfig, GenerationSettings
from .connection import SwarmConnection
from .event_loop import EventLoopThread
from .generate_output import generate_output
from .generation import Generator, Prompt
from .model_text import ModelText
from .output import OutputChunk
from .prompts import Prompts
from .routing.connect import connect
from .routing.peers import ConnectError, KnownPeers
from .routing.route import Route
from .routing.trusted_ends import TrustedEnds
from .session.options import SessionOptions
from .session.session import Session
from .tensors import tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

# For blocks that lose their last peer in mid-generation.
WAIT_S = 30.0


class Streamer(Protocol):
    """transformers' streamer: `put` gets token ids as tensors or arrays, the prompt first; `end` closes."""

    def put(self, value: Any) -> None: ...
    def end(self) -> None: ...


class GenerateArguments(GenerationSettings, total=False):
    """Keyword arguments of `generate`; AsyncSwarmModel.generate says what they mean."""

    input_ids: Any
    attention_mask: Any
    streamer: Streamer | None
    progress: Callable[[int, int], None] | None
    return_exceptions: bool


class AsyncSwarmModel:
    """A model that a swarm runs; every method belongs to the event loop that called `connect`.

    >>> model = await AsyncSwarmModel.connect("demo", ["127.0.0.1:31337"])
    >>> await model.generate("The capital of France is", max_new_tokens=8)
    """

    def __init__(self, name: str, generator: Generator) -> None:
        self.name = name
        self.generator = generator
        self.connection = generator.connection

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
        local_ends: bool = False,
        trusted_ends: str | Collection[str] = (),
        drafter_device: str = "cpu",
        wait_s: float | None = None,
    ) -> AsyncSwarmModel:
        """Find the model's peers. `initial_peers` are gRPC host:port of any peers, or libp2p multiaddrs.

        `join` is an invitation to a private swarm, or a file that holds it, in place of `initial_peers`.
        `codec` carries activations: "float32", "bf16" or "int8".
        `exact` keeps to peers that promise the same bits for a row in any batch, tree or chunk, by one arithmetic.
        `allow_mixed` lets a route mix dtypes and quantizations where no one profile has every block; by default it does
        not, since the text would depend on the route.
        `local_ends` runs embedding, LM head and sampler on this machine, with `logits_processor`s of one's own; peers
        get embeddings in place of token ids. It needs the checkpoint, torch and transformers.
        `trusted_ends` are labels, such as lab=oxford, that the peers of the first and the last block must have.
        `drafter_device` is where draft models compute: "cpu", "cuda", "cuda:1", …
        Waits up to `wait_s` seconds for blocks without a peer: by default not at all to begin with, and WAIT_S where
        they are lost while it generates. Raises ConnectError.
        """
        if exact and allow_mixed:
            raise SettingsError("exact and allow_mixed contradict each other: a mixed route is not exact")
        if codec not in CODECS:
            raise SettingsError(f"codec is one of {', '.join(CODECS)}, not {codec!r}")
        name, digest, text = await asyncio.to_thread(_identify, model, tokenizer)
        trust, directory = await connect(initial_peers, join)
        ends = TrustedEnds(trust, frozenset([trusted_ends] if isinstance(trusted_ends, str) else trusted_ends))
        defaults = SessionOptions(0, CODECS[codec], exact, allow_mixed, wait_s=WAIT_S if wait_s is None else wait_s)
        known = KnownPeers(directory, trust, name, digest, ends.limit, OwnWeights(model) if digest else None)
        connection = SwarmConnection(known, directory, ends, defaults, model if local_ends else None)
        try:
            await connection.start(wait_s or 0.0)
        except BaseException:
            await connection.close()
            raise
        return cls(name, Generator(connection, text, drafter_device))

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's own, or the one given to `connect`."""
        return self.generator.tokenizer

    @property
    def trusted_ends(self) -> TrustedEnds:
        """Whom the first and the last block are left to."""
        return self.connection.ends

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.connection}>"

    async def close(self) -> None:
        """Leave the swarm; sessions end. Nothing where it was left already."""
        await self.connection.close()

    async def route(self, reserve_tokens: int = 0) -> Route:
        """The route that a new session would take. Raises NoRoute, ConnectError."""
        return await self.connection.route(reserve_tokens)

    async def open_session(self, reserve_tokens: int, wait_s: float | None = None) -> Session:
        """A session for steps of one's own; see SwarmConnection.open_session. Raises PeerError, NoRoute."""
        return await self.connection.open_session(reserve_tokens, wait_s)

    def chat(self, system: str | None = None, reserve_tokens: int = 4096) -> AsyncChat:
        """A conversation whose session stays open between turns."""
        return AsyncChat(self.generator, system, reserve_tokens)

    def stream(self, prompt: Prompt, **settings: Unpack[GenerationSettings]) -> AsyncIterator[OutputChunk]:
        """Chunks of the answer as they come."""
        return self.generator.stream(self.generator.encode(prompt), self.generator.config(settings).alone())

    async def generate(
        self,
        inputs: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        streamer: Streamer | None = None,
        progress: Callable[[int, int], None] | None = None,
        return_exceptions: bool = False,
        **settings: Unpack[GenerationSettings],
    ) -> Any:
        """As transformers' `generate`: ids in, prompt + answer ids out; text in, the answer's text out.

        `inputs` or `input_ids` is one prompt or a list: text, messages, token ids, a tensor [batch, length] (then a
        tensor comes back, padded with `pad_token_id` or the end-of-text id), or what a tokenizer of transformers
        returns: padding counts by its mask, else by the pad id, and stays in the results. With `num_return_sequences`
        above 1 every prompt gives that many results. A `streamer` gets ids as transformers' own do. `progress` is told
        after each answer how many there are, and of how many. Where one prompt fails the others are given up and its
        error is raised; with `return_exceptions` they go on, and a PetalError stands in the list in its place.
        Raises SettingsError, PeerError, NoRoute, ConnectError.
        """
        if settings.get("top_logprobs") or settings.get("trace"):
            raise SettingsError("generate gives text or ids: top_logprobs and trace come with what stream() yields")
        if (inputs is None) == (input_ids is None):
            raise SettingsError("give prompts once: as the first argument or as input_ids")
        config = self.generator.config(settings)
        eos_ids = config.eos_ids(self.tokenizer)
        padding = config.pad_token_id if config.pad_token_id not in eos_ids else None
        prompts = Prompts.of(input_ids if inputs is None else inputs, attention_mask, padding)
        if return_exceptions and prompts.like is not None:
            raise SettingsError("return_exceptions needs prompts in lists: rows of a tensor hold no errors")
        encoded = [self.generator.encode(prompt) for prompt in prompts.rows]
        if streamer is not None:
            if len(encoded) != 1 or config.num_return_sequences != 1 or config.num_beams != 1:
                raise SettingsError("a streamer takes one prompt and one sequence, of one beam")
            groups: list[list[Answer]] = [[await self._stream_to(streamer, encoded[0], config)]]
        else:
            groups = await Batch(self.generator, config, progress, return_exceptions).answers(encoded)
        pad = config.pad_token_id
        if pad is None:
            pad = min(self.generator.config({}).eos_ids(self.tokenizer), default=0)
        result = prompts.result(groups, pad)
        if not config.return_dict_in_generate:
            return result
        return await asyncio.to_thread(generate_output, result, encoded, groups, config, eos_ids)

    async def _stream_to(self, streamer: Streamer, ids: list[int], config: GenerationConfig) -> list[OutputChunk]:
        """As transformers does: the prompt [1, length] first, then each token [1]."""
        chunks = []
        try:
            streamer.put(tensor([ids]))
            async for chunk in self.generator.stream(ids, config):
                chunks.append(chunk)
                for token in chunk.ids:
                    streamer.put(tensor([token]))
        finally:
            streamer.end()  # whoever waits for more on another thread waits no longer
        return chunks


class SwarmModel:
    """A model that a swarm runs.

    >>> model = SwarmModel.connect("demo", initial_peers=["127.0.0.1:31337"])
    >>> model.generate("The capital of France is", max_new_tokens=8)

    Synchronous methods work anywhere; their twins with a leading `a` are awaited in any event loop.
    """

    def __init__(self, core: AsyncSwarmModel, loop: EventLoopThread) -> None:
        self._core = core
        self._loop = loop

    @classmethod
    def connect(
        cls,
        model: str,
        initial_peers: Sequence[str] = (),
        *,
        join: str | None = None,
        tokenizer: Tokenizer | None = None,
        codec: str = "float32",
        exact: bool = False,
        allow_mixed: bool = False,
        local_ends: bool = False,
        trusted_ends: str | Collection[str] = (),
        drafter_device: str = "cpu",
        wait_s: float | None = None,
    ) -> SwarmModel:
        """See AsyncSwarmModel.connect. Raises ConnectError."""
        loop = EventLoopThread()
        try:
            core = loop.run(
                AsyncSwarmModel.connect(
                    model,
                    initial_peers,
                    join=join,
                    tokenizer=tokenizer,
                    codec=codec,
                    exact=exact,
                    allow_mixed=allow_mixed,
                    local_ends=local_ends,
                    trusted_ends=trusted_ends,
                    drafter_device=drafter_device,
                    wait_s=wait_s,
                )
            )
        except BaseException:
            loop.stop()
            raise
        return cls(core, loop)

    @property
    def name(self) -> str:
        """The model's, as its peers know it."""
        return self._core.name

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's own, or the one given to `connect`."""
        return self._core.tokenizer

    @property
    def trusted_ends(self) -> TrustedEnds:
        """Whom the first and the last block are left to."""
        return self._core.trusted_ends

    def generate(self, inputs: Any = None, **arguments: Unpack[GenerateArguments]) -> Any:
        """See AsyncSwarmModel.generate."""
        return self._loop.run(self._core.generate(inputs, **arguments))

    async def agenerate(self, inputs: Any = None, **arguments: Unpack[GenerateArguments]) -> Any:
        """See AsyncSwarmModel.generate."""
        return await self._loop.delegate(self._core.generate(inputs, **arguments))

    def stream(self, prompt: Prompt, **settings: Unpack[GenerationSettings]) -> Iterator[OutputChunk]:
        """Chunks of the answer as they come: `for chunk in model.stream("Hi"): print(chunk.text, end="")`."""
        return self._loop.iterate(self._core.stream(prompt, **settings))

    def astream(self, prompt: Prompt, **settings: Unpack[GenerationSettings]) -> AsyncIterator[OutputChunk]:
        """See `stream`."""
        return self._loop.delegate_iteration(self._core.stream(prompt, **settings))

    def chat(self, system: str | None = None, reserve_tokens: int = 4096) -> Chat:
        """A conversation whose session stays open between turns."""
        return Chat(self._core.chat(system, reserve_tokens), self._loop)

    def route(self) -> Route:
        """The route that a new session would take. Raises NoRoute."""
        return self._loop.run(self._core.route())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self._core.connection}>"

    def close(self) -> None:
        """Leave the swarm; sessions end. Nothing where it was left already."""
        if self._loop.runs:
            self._loop.run(self._core.close())
            self._loop.stop()

    def __enter__(self) -> SwarmModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _identify(model: str, tokenizer: Tokenizer | None) -> tuple[str, bytes | None, ModelText]:
    """Name, digest and text of a checkpoint; where there is none, the name will do. Raises ConnectError."""
    try:
        with open_checkpoint(model) as checkpoint:
            return checkpoint.name, bytes.fromhex(checkpoint.digest()), ModelText.of(checkpoint, tokenizer)
    except CheckpointError as error:
        if tokenizer is None:
            raise ConnectError(str(error)) from error
        ends = GenerationDefaults(tokenizer.eos_ids)
        return model, None, ModelText(tokenizer, defaults=ends)
