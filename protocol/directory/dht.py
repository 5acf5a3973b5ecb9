"""The directory in the DHT. The only module that imports hivemind, which takes seconds, as hivemind loads torch."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.dht.routing import DHTID
from hivemind.dht.validation import DHTRecord, RecordValidatorBase
from hivemind.p2p import P2P, P2PDaemonError, PeerID
from hivemind.utils.multiaddr import Multiaddr
from hivemind.utils.serializer import MSGPackSerializer

from .. import petal_pb2 as pb
from ..trust.identity import Identity
from .directory import MAX_REPLY_BYTES, Directory, DirectoryError, Peers, RecordBook
from .records import (
    CLOCK_SKEW_S,
    MAX_LIFETIME_S,
    RecordError,
    authenticate,
    parse_signed,
    sign_record,
    tombstone,
    verify_record,
)

logger = logging.getLogger(__name__)
DAEMON_START_S = 60.0  # slow machines need most of it
ANSWER_S = 15.0
GREET_S = 30.0
# To us, on this machine; and for a connection.
DAEMON_ANSWER_S = 5.0
_INDEX = "petal 1 models"
_T = TypeVar("_T")
_Start = Callable[[Sequence[str], Sequence[str]], Awaitable[tuple[P2P, DHTNode]]]


class OwnedRecords(RecordValidatorBase):
    """Refuses whatever is not a peer's signed record in that peer's own place.

    A validator sees the hash of a key, the packed subkey and the packed value. The hash cannot be read back, so the
    value tells which keys it may stand under. hivemind throws a whole dictionary away for one bad entry: a record that
    expired on its way is therefore no fault here; readers drop it.
    """

    def validate(self, record: DHTRecord) -> bool:
        try:
            peer = authenticate(parse_signed(_unpack(record.value)))
        except RecordError as error:
            logger.debug("Refused a DHT value: %s", error)
            return False
        return (
            record.subkey == MSGPackSerializer.dumps(peer.peer_id)
            and record.key in (DHTID.generate(key).to_bytes() for key in (_INDEX, _model_key(peer.model)))
            and record.expiration_time == peer.expires_at
            and peer.expires_at < time.time() + MAX_LIFETIME_S + CLOCK_SKEW_S
        )


class DhtDirectory(Directory):
    """A node of the DHT in this event loop (with a daemon process of its own), and the records seen through it."""

    def __init__(self, start: _Start, p2p: P2P, node: DHTNode, initial_peers: Sequence[str]) -> None:
        self.book = RecordBook()
        self._start = start
        self._p2p = p2p
        self._node = node
        self._initial_peers = {_peer_of(address): address for address in initial_peers}
        self._greeted_at = time.monotonic()
        self._greeting: asyncio.Task[bool] | None = None
        self._restarting = asyncio.Lock()
        self._listen: Sequence[str] = ()
        self._suspect = False

    @classmethod
    async def create(
        cls,
        identity_path: str | os.PathLike[str] | None = None,
        *,
        initial_peers: Sequence[str] = (),
        listen: Sequence[str] = ("/ip4/0.0.0.0/tcp/0",),
        announce: Sequence[str] = (),
        client_mode: bool = False,
        relay: bool = False,
        known: bool = False,
    ) -> DhtDirectory:
        """Join the DHT through `initial_peers` (multiaddrs), or start one if there are none but this node itself.

        DirectoryError if none of them answers, unless they are `known` to be right: then they may come later. A client
        only reads: it listens nowhere and stores nothing for others. With `relay` the daemon passes others' traffic on,
        and is reached through others that do.
        """
        own = None if identity_path is None else Identity.load_or_create(identity_path).peer_id
        others = [address for address in initial_peers if _peer_of(address) != own]
        start = partial(_start_node, identity_path, announce, client_mode, relay)
        try:
            directory = cls(start, *await start(others, listen), others)
        except DirectoryError:
            if not known or client_mode:
                raise
            directory = cls(start, *await start((), listen), others)
        # A daemon that is started again listens where the others know it.
        directory._listen = listen if client_mode else await directory._listening(listen)
        return directory

    @property
    def peer_id(self) -> str:
        """The node's libp2p id: the identity's, if it has one."""
        return str(self._p2p.peer_id.to_base58())

    async def list(self, model: str | None = None) -> Peers:
        """See Directory; one look-up. DirectoryError if nobody in the DHT answers."""
        await self._stay_joined()
        found = await self._within(self._node.get(_INDEX if model is None else _model_key(model), latest=True))
        for data, _ in found.value.values() if found else ():
            with suppress(RecordError):  # expired on its way
                self.book.add(parse_signed(data))
        return self.book.list(model)

    async def publish(self, signed: pb.SignedRecord) -> None:
        """Store a record under its model and in the index; it must expire later than the one it replaces."""
        record = verify_record(signed)
        self.book.add(signed)
        await self._stay_joined()
        keys = [_model_key(record.model), _INDEX]
        stored = await self._within(
            self._node.store_many(
                keys, [signed.SerializeToString()] * 2, record.expires_at, subkeys=[record.peer_id] * 2
            )
        )
        if not all(stored.values()):
            raise DirectoryError(
                f"The DHT did not take the record of {record.peer_id}: it holds one that expires later, "
                "or its nodes do not answer."
            )

    async def withdraw(self, identity: Identity, record: pb.PeerRecord) -> None:
        """Replace `record`, the last one published, by a tombstone."""
        await self.publish(sign_record(identity, tombstone(record)))

    def hear(self, request: pb.ListRequest) -> None:
        """Nothing: what a caller tells is not in the DHT."""

    async def multiaddrs(self) -> Sequence[str]:
        """Where others can join the DHT through this node, addresses of this machine only last."""
        addresses = [str(address) for address in await self._node.get_visible_maddrs(latest=True)]
        return sorted(addresses, key=lambda address: address.startswith(("/ip4/127.", "/ip6/::1/")))

    async def close(self) -> None:
        """Leave the DHT and end the daemon."""
        if self._greeting is not None:
            self._greeting.cancel()
        await _stop_node(self._p2p, self._node)

    async def _stay_joined(self) -> None:
        """Restart a daemon that died; greet lost initial peers, whom hivemind forgets, lest the swarm stay split."""
        async with self._restarting:
            if self._suspect:
                await self._end_frozen()
            if self._p2p._child.returncode is not None:
                logger.warning("The DHT daemon died: starting it again")
                await _stop_node(self._p2p, self._node)
                self._p2p, self._node = await self._started_again()
        table = self._node.protocol.routing_table
        lost = [peer for peer in self._initial_peers if table.get(peer_id=peer) is None]
        alone = not table.uid_to_peer_id
        due = time.monotonic() - self._greeted_at > GREET_S
        if lost and (alone or due) and (self._greeting is None or self._greeting.done()):
            self._greeted_at = time.monotonic()
            self._greeting = asyncio.create_task(self._greet(lost))
        if lost and alone and self._greeting is not None and not await asyncio.shield(self._greeting):
            raise _unreachable(list(self._initial_peers.values()))

    def remember(self, multiaddrs: Iterable[str]) -> None:
        """More ways into the DHT than those to begin with."""
        for address in multiaddrs:
            with suppress(DirectoryError):
                if (peer := _peer_of(address)) != self._p2p.peer_id:
                    self._initial_peers.setdefault(peer, address)

    async def _listening(self, listen: Sequence[str]) -> Sequence[str]:
        """`listen` with the ports that it came to."""
        if not any(address.endswith("/tcp/0") for address in listen):
            return listen
        ports = {address.split("/tcp/")[1].split("/")[0] for address in await self.multiaddrs() if "/tcp/" in address}
        port = ports.pop() if len(ports) == 1 else "0"
        return [address.removesuffix("/tcp/0") + f"/tcp/{port}" for address in listen]

    async def _started_again(self) -> tuple[P2P, DHTNode]:
        """Through whoever was known; where none of them answers, alone, so that they find this one."""
        try:
            return await self._start(list(self._initial_peers.values()), self._listen)
        except DirectoryError:
            return await self._start((), self._listen)

    async def _end_frozen(self) -> None:
        """A daemon that says nothing to us either will say nothing more."""
        self._suspect = False
        try:
            await asyncio.wait_for(self._p2p._client.identify(), DAEMON_ANSWER_S)
        except Exception:  # of every kind, as daemons end
            logger.warning("The DHT daemon hangs: ending it")
            if self._p2p._child.returncode is None:
                self._p2p._child.kill()
                await self._p2p._child.wait()

    async def _within(self, call: Awaitable[_T]) -> _T:
        """Raises DirectoryError where no answer comes in time, and looks at the daemon before the next call."""
        try:
            return await _bounded(call)
        except DirectoryError:
            self._suspect = True
            raise

    async def _greet(self, peers: Sequence[PeerID]) -> bool:
        for peer in peers:
            with suppress(Exception):  # whatever the daemon says of an address: the ping tells
                await asyncio.wait_for(
                    self._p2p._client.connect(peer, [_transport(self._initial_peers[peer])]), DAEMON_ANSWER_S
                )
        answers = await asyncio.gather(*(self._node.protocol.call_ping(peer) for peer in peers))
        await asyncio.sleep(0)  # the ping's own task enters the peer into the routing table
        return any(answers)


class _OwnSession(P2P):
    """A daemon in a session of its own: Ctrl-C at a terminal reaches this program alone, which leaves in order."""

    @staticmethod
    def _make_process_args(*args: Any, **kwargs: Any) -> list[str]:
        command: list[str] = P2P._make_process_args(*args, **kwargs)
        setsid = shutil.which("setsid")
        return [setsid, *command] if setsid else command


async def _start_node(
    identity_path: str | os.PathLike[str] | None,
    announce: Sequence[str],
    client_mode: bool,
    relay: bool,
    initial_peers: Sequence[str],
    listen: Sequence[str],
) -> tuple[P2P, DHTNode]:
    p2p = await _start_daemon(identity_path, initial_peers, listen, announce, client_mode, relay)
    try:
        node = await DHTNode.create(
            p2p=p2p,
            initial_peers=initial_peers,
            client_mode=client_mode,
            record_validator=OwnedRecords(),
            backoff_rate=1.0,  # else a peer that was away for long is shunned for long
            cache_locally=False,  # records live for seconds: a cache would only serve old ones
            cache_nearest=0,
            cache_on_store=False,
        )
    except (RuntimeError, ValidationError) as error:
        await p2p.shutdown()
        if isinstance(error, RuntimeError):  # no ping was answered
            raise _unreachable(initial_peers) from error
        raise DirectoryError(f"The DHT refuses this node, open its port and set its clock: {error}.") from error
    return p2p, node


async def _stop_node(p2p: P2P, node: DHTNode) -> None:
    node.is_alive = False  # its own shutdown waits forever for a daemon that died
    # A daemon that is told to end may still complain of it; who ends it has no use for that.
    daemon = logging.getLogger("hivemind.p2p.p2p_daemon")
    level = daemon.level
    daemon.setLevel(logging.CRITICAL)
    try:
        await p2p.shutdown()
    finally:
        daemon.setLevel(level)


async def _start_daemon(
    identity_path: str | os.PathLike[str] | None,
    initial_peers: Sequence[str],
    listen: Sequence[str],
    announce: Sequence[str],
    client_mode: bool,
    relay: bool,
) -> P2P:
    role = {"dht_mode": "client", "no_listen": True} if client_mode else {"host_maddrs": list(listen)}
    try:
        return await _OwnSession.create(
            initial_peers=list(initial_peers),
            identity_path=None if identity_path is None else os.fspath(identity_path),
            announce_maddrs=list(announce),
            startup_timeout=DAEMON_START_S,
            persistent_conn_max_msg_size=MAX_REPLY_BYTES,
            use_relay=relay,
            use_auto_relay=relay,
            check_if_identity_free=False,  # it starts a second daemon, and takes a peer that just crashed for alive
            **role,
        )
    except P2PDaemonError as error:
        await asyncio.sleep(0.2)  # until the loop hears of the daemon's end, too
        if "bootstrap" in str(error):
            raise _unreachable(initial_peers) from error
        raise DirectoryError(f"The DHT daemon did not start, check the listen addresses {listen}: {error}.") from error


async def _bounded(call: Awaitable[_T]) -> _T:
    try:
        return await asyncio.wait_for(call, ANSWER_S)
    except asyncio.TimeoutError:
        raise DirectoryError(f"The DHT did not answer within {ANSWER_S:.0f} s: check your network.") from None


def _unreachable(initial_peers: Sequence[str]) -> DirectoryError:
    return DirectoryError(
        f"None of the DHT's initial peers answers ({', '.join(initial_peers)}): check that one of them runs, "
        "that its address and peer id are current, and that no firewall is between."
    )


def _peer_of(address: str) -> PeerID:
    try:
        return PeerID.from_base58(Multiaddr(address)["p2p"])
    except (ValueError, LookupError):
        raise DirectoryError(f"{address!r} is no peer's multiaddr such as /ip4/1.2.3.4/tcp/31337/p2p/Qm...") from None


def _transport(address: str) -> Multiaddr:
    return Multiaddr(address.rpartition("/p2p/")[0])


def _model_key(model: str) -> str:
    return f"petal 1 model {model}"


def _unpack(value: bytes) -> bytes:
    """The bytes inside their msgpack form, the only one that hivemind makes."""
    header = {b"\xc4": 2, b"\xc5": 3, b"\xc6": 5}.get(value[:1], 0)
    data = value[header:]
    if MSGPackSerializer.dumps(data) != value:
        raise RecordError("A DHT value holds no bytes.")
    return data
