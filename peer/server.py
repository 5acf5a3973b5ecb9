"""One peer: checkpoint, span, engine, DHT node and gRPC server in one process and one event loop."""

from __future__ import annotations

import asyncio
import re
from functools import cached_property

import grpc
import torch

from ..kernels.backend import Backend
from ..kernels.registry import NoBackend, backend_for
from ..protocol import petal_pb2 as pb
from ..protocol.checkpoint.checkpoint import Checkpoint
from ..protocol.checkpoint.open import open_checkpoint
from ..protocol.directory.dht import DhtDirectory
from ..protocol.directory.public import PublicDirectory
from ..protocol.host import WILDCARDS, is_loopback
from ..protocol.memory import available_bytes
from ..protocol.petal_pb2_grpc import add_DirectoryServicer_to_server, add_PeerServicer_to_server
from ..protocol.private.gossip import GossipDirectory
from ..protocol.private.joining import join
from ..protocol.private.membership import Membership
from ..protocol.trust.interceptor import TrustInterceptor
from ..protocol.trust.trust import PublicTrust, Trust
from ..protocol.wire.limits import MAX_ROWS, PROTOCOL, PROTOCOL_MIN, SERVER_OPTIONS
from .bootstrap import ways_into_dht
from .engine.engine import Engine
from .engine.kv_cache import KVCache
from .engine.scheduler import Budget
from .engine.watchdog import STALL_S, Watchdog
from .fellows import fellows
from .grammars import grammar_checker, grammar_feature
from .identity import Claim
from .joining import Joiner, ServeError, cache_tokens
from .limits.admission import Admission
from .limits.memory import give_back
from .limits.rates import CallRates
from .model.precision import NONE
from .options import ServeOptions
from .ports import Ports
from .progress import StartProgress
from .rpc.announcement import Announcement
from .rpc.connections import Connections
from .rpc.flood_guard import FloodGuard
from .rpc.open_checks import FEATURES, ServiceInfo
from .rpc.service import PeerService
from .rpc.sessions import Sessions
from .throughput import decode_tokens_per_s, free_bytes

_WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "n_embd", "n_inner", "ffn_dim")


class PeerServer:
    """A running peer. `start` returns when it serves; `stop` leaves cleanly."""

    def __init__(self, options: ServeOptions, progress: StartProgress | None = None) -> None:
        self.options = options
        self._progress = progress or StartProgress()

    async def start(self) -> None:
        """Raises CheckpointError, DirectoryError, IdentityInUse or ServeError."""
        if contradiction := self.options.contradiction():
            raise ServeError(contradiction)
        self._claim = Claim.named(self.options.identity)
        try:
            await self._start()
        except BaseException:
            self._claim.release()
            raise

    async def _start(self) -> None:
        options, self.identity = self.options, self._claim.identity
        # Why this peer serves no more, though nobody has told it to end.
        self.fallen: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        # Off the loop, which hears signals meanwhile: a hub may be slow to answer, and kernels are compiled.
        await asyncio.to_thread(self._open)
        self.trust: Trust = PublicTrust(self.identity)
        if options.join is not None:
            self.trust = await join(options.join, self.identity, self._claim.memberships)
        self._connections = Connections()
        self._grpc = grpc_server(options.rates, self._connections, self.trust)
        self._ports = Ports(options, self._claim, self._progress.note)
        self.port = self._connections.port = self._ports.bind(self._grpc, self.trust.server_credentials())
        self.address = options.announced(self.port)
        if is_loopback(self.address.rpartition(":")[0]) and options.host in WILDCARDS:
            self._progress.note(
                "this machine has no network: only programs on it reach this peer; --announce host:port says otherwise"
            )
        try:
            self._progress.stage("joining the swarm")
            self.directory = await self._join_directory()
            try:
                await self._load()
                await self._serve()
            except BaseException:
                await self.directory.close()
                raise
        except BaseException:
            await self._grpc.stop(None)
            raise

    def _open(self) -> None:
        self.checkpoint = open_checkpoint(self.options.model)
        try:
            self.backend = backend_for(self.options.device, self._building)
        except NoBackend as error:
            raise ServeError(str(error)) from error
        set_up(self.options, self.backend, self.checkpoint)

    def _building(self, done: int, total: int) -> None:
        self._progress.stage(f"compiling the kernels, once on this machine: {done} of {total} files")

    async def _join_directory(self) -> PublicDirectory | GossipDirectory:
        options = self.options
        if isinstance(self.trust, Membership):
            gossip = GossipDirectory(self.trust, self.address)
            await gossip.join()
            return gossip
        met = [] if not options.initial_peers else self._claim.peers()
        ways = await ways_into_dht(options.initial_peers, met, self.trust, self._progress.note)
        listen, known = (self._ports.dht(),), {*ways} <= {*met}
        dht = await DhtDirectory.create(
            self._claim.path, initial_peers=ways, listen=listen, relay=options.relay, known=known
        )
        if found := re.search(r"/tcp/(\d+)/", " ".join(await dht.multiaddrs())):
            self._ports.remember_dht(int(found[1]))
        seeds = [*options.initial_peers, *met]
        return PublicDirectory(dht, self.trust, self.identity.peer_id, seeds, self._claim.remember_peers)

    async def _load(self) -> None:
        """Choose a span, load it off the loop, and measure it."""
        checkpoint, options = self.checkpoint, self.options
        self._name, records = await fellows(
            self.directory, self.identity.peer_id, checkpoint, options.model, self._progress.note
        )
        joiner = Joiner(options, checkpoint, self.backend, free_bytes(self.backend), self._progress.note)
        self._precision = precision = joiner.precision(records)
        joiner = await asyncio.to_thread(joiner.in_step, precision, records)
        self.backend = joiner.backend
        self.blocks = joiner.blocks(precision, records)
        quant = "" if precision.quant == NONE else f" in {precision.quant}"
        self._progress.stage(f"loading blocks {self.blocks.start}:{self.blocks.stop} of {checkpoint.name}{quant}")
        self.span = await asyncio.to_thread(joiner.load, precision, self.blocks, self._progress.loading)
        if options.exact and (obstacle := self.span.exactness_obstacle()):
            raise ServeError(f"--exact cannot be promised here: {obstacle}")
        free, layers, kind = self.backend.free_bytes(available_bytes()), self.span.layers, self.backend.kv_dtypes[0]
        tokens = cache_tokens(options.cache_tokens, layers, kind, free, self._progress.note)
        cache = KVCache(self.backend, layers, tokens)
        self._throughput = await asyncio.to_thread(decode_tokens_per_s, self.span)
        digests = await asyncio.to_thread(checkpoint.block_digests, self.blocks.start, self.blocks.stop)
        self._digests = {part: bytes.fromhex(digest) for part, digest in digests.items()}
        self.admission = Admission(cache.n_pages, options.max_sessions)
        self.engine = Engine(self.span, cache)
        await asyncio.to_thread(self.engine.warm_up)

    async def _serve(self) -> None:
        self.announcement = Announcement(self.directory, self.identity, self.trust, self._served(), self.admission)
        info = ServiceInfo(
            peer_id=self.identity.peer_id,
            model=self._name,
            model_digest=self._model_digest(),
            start=self.blocks.start,
            end=self.blocks.stop,
            n_blocks=self.checkpoint.n_blocks,
            hidden_size=self.span.hidden_size,
            vocab_size=self.span.vocab_size,
            context_length=self.span.context_length,
            features=self._features,
            idle_s=self.options.idle_s,
            replay_bytes=self.options.replay_bytes,
        )
        quotas, rate = self.options.quotas, self.options.rates.identity
        grammars = grammar_checker(self.checkpoint, self.blocks, self.span.vocab_size)
        sessions = Sessions(info, self.engine, self.admission, self.trust, quotas, rate)
        self.service = PeerService(sessions, self.trust, self.announcement.resolve, self._connections, grammars)
        add_PeerServicer_to_server(self.service, self._grpc)
        add_DirectoryServicer_to_server(self.announcement.service(), self._grpc)
        await self.announcement.prepare()
        self.engine.start()
        await self._grpc.start()
        watchdog = Watchdog(self.engine.thread, self.engine.call, stall_s(self._throughput), self._fall)
        self._background = asyncio.gather(watchdog.run(), give_back(), self._connections.keep_room())
        await self.announcement.start(self.options.publish_s, self.service.sweep)

    def _fall(self, reason: str) -> None:
        """Compute does not get on: the clients go elsewhere at once."""
        self.service.sessions.draining = True
        self.service.sessions.end()
        self.fallen.set_result(self.engine.lost or reason)

    async def drain(self, grace_s: float) -> None:
        """Say in the record that this peer leaves, take no new sessions, and give the running ones time to move."""
        self.announcement.state = pb.DRAINING
        announcing = asyncio.create_task(self.announcement.publish())
        try:
            await self.service.sessions.drain(grace_s)
        finally:
            announcing.cancel()

    async def stop(self) -> None:
        """Take no new sessions, withdraw the record, end what runs, leave the DHT."""
        self._background.cancel()
        await asyncio.gather(self._background, return_exceptions=True)
        self.service.sessions.draining = True
        await self.announcement.stop()
        await self.service.close()
        await self._grpc.stop(grace=1.0)
        if not self.fallen.done():
            await asyncio.to_thread(self.engine.stop)
        await self.directory.close()
        self._claim.release()

    def record(self) -> pb.PeerRecord:
        """What the directory says of this peer, as of now."""
        return self.announcement.record()

    @cached_property
    def _features(self) -> frozenset[str]:
        grammar = grammar_feature(self.checkpoint, self.blocks)
        return FEATURES | ({"exact"} if self.options.exact else set()) | ({grammar} if grammar else set())

    def _served(self) -> pb.PeerRecord:
        """What never changes of the record."""
        return pb.PeerRecord(
            peer_id=self.identity.peer_id,
            model=self._name,
            model_digest=self._model_digest(),
            n_blocks=self.checkpoint.n_blocks,
            start=self.blocks.start,
            end=self.blocks.stop,
            addresses=[self.address],
            dtype=self._precision.dtype_name,
            quantization=self._precision.quant,
            numerics=self._precision.numerics(self.backend),
            protocol_min=PROTOCOL_MIN,
            protocol_max=PROTOCOL,
            context_length=self.span.context_length,
            cache_tokens=self.engine.cache.tokens,
            max_sessions=self.options.max_sessions,
            max_rows=MAX_ROWS,
            throughput=self._throughput,
            block_digests=[self._digests[str(block)] for block in self.blocks],
            embedding_digest=self._digests.get("embedding", b""),
            norm_digest=self._digests.get("norm", b""),
            head_digest=self._digests.get("head", b""),
            vocab_size=self.span.vocab_size,
            hidden_size=self.span.hidden_size,
            features=sorted(self._features),
        )

    def _model_digest(self) -> bytes:
        return bytes.fromhex(self.checkpoint.digest())


def grpc_server(rates: CallRates, connections: Connections, trust: Trust) -> grpc.aio.Server:
    """What callers meet first: a budget of connections, rates of calls, then whom this peer trusts."""
    return grpc.aio.server(
        interceptors=[FloodGuard(rates, connections), TrustInterceptor(trust)],
        options=[*SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", connections.budget)],
    )


def set_up(options: ServeOptions, backend: Backend, checkpoint: Checkpoint) -> None:
    """Threads and memory.

    In exact mode torch's own operations keep to one thread: where it cuts a tensor would show in the bits.

    Raises ServeError.
    """
    threads = options.threads or torch.get_num_threads()
    if options.exact and (obstacle := backend.exactness_obstacle(layer_widths(checkpoint))):
        raise ServeError(f"--exact cannot be promised here: {obstacle}")
    backend.threads, backend.memory_share = threads, options.gpu_memory
    torch.set_num_threads(1 if options.exact else threads)


def stall_s(rows_per_s: float) -> float:
    """The longest iteration is a full one, row by row."""
    return STALL_S + Budget().rows / rows_per_s if rows_per_s > 0 else STALL_S


def layer_widths(checkpoint: Checkpoint) -> list[int]:
    """Of hidden states and what is within blocks, as the config names them."""
    return [value for name, value in checkpoint.config.items() if name in _WIDTHS and isinstance(value, int)]
