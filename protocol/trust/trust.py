"""Whom this machine believes, and how it shows who it is: one policy for public swarms, one for private ones.

Every connection is TLS 1.3. In a public swarm a peer's signed record names its TLS certificate, and callers pin it; who
calls signs a hello. In a private one both ends show certificates that chain to the swarm's root (`private.membership`).
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import ssl
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from cryptography import x509

from .. import petal_pb2 as pb
from ..errors import PetalError
from ..wire.limits import CHANNEL_OPTIONS
from .identity import Identity
from .tls_key import (
    TlsKey,
    dns_names,
    is_self_signed,
    key_hash,
    name_of,
    parse_certificate,
    pem_of,
    self_signed,
    verify_leaf,
)

NONCE_BYTES = 16
CLIENT_ID_BYTES = 16
DIAL_S = 5.0
_HELLO = b"petal hello 1\0"
_TLS_VERSION = "TLSv1.3"

Options = Sequence[tuple[str, Any]]
AuthContext = Mapping[str, Iterable[bytes]]


class TrustError(PetalError):
    """Why somebody is not believed, in one sentence."""


@dataclass(frozen=True)
class Principal:
    """Who is at the other end of a call: the name of its key; in a private swarm its role, labels and certificates."""

    name: str
    role: str = "client"
    labels: tuple[tuple[str, str], ...] = ()
    certificates: tuple[bytes, ...] = ()

    @property
    def share(self) -> str:
        """Who shares a peer's time with others as one: a lab, or whoever belongs to none."""
        return dict(self.labels).get("lab", self.name)


class Trust(ABC):
    """What both policies answer."""

    @property
    @abstractmethod
    def certificates(self) -> list[bytes]:
        """This machine's own chain (DER), the TLS key's first."""

    @property
    def nonce(self) -> bytes:
        """What callers sign; empty where their certificates say who they are."""
        return b""

    @property
    @abstractmethod
    def client_id(self) -> bytes:
        """What this machine calls itself when it opens sessions: 16 bytes that its key proves."""

    @abstractmethod
    def server_credentials(self) -> grpc.ServerCredentials:
        """What a server shows, and asks of its callers."""

    @abstractmethod
    def channel(self, record: pb.PeerRecord, address: str, options: Options = CHANNEL_OPTIONS) -> grpc.aio.Channel:
        """A channel to the peer of a verified record, at one of its addresses, and to nobody else."""

    @abstractmethod
    def dial(self, address: str, options: Options) -> AbstractAsyncContextManager[grpc.aio.Channel]:
        """A channel to whoever of the swarm answers at `address`. Raises OSError where nobody does."""

    @abstractmethod
    def hello(self, record: pb.PeerRecord, session_id: bytes) -> pb.Hello | None:
        """What a call to that peer begins with."""

    @abstractmethod
    def principal(self, context: AuthContext, hello: pb.Hello, session_id: bytes) -> Principal:
        """Who calls. Raises TrustError."""

    def admit(self, context: AuthContext) -> None:
        """Check any call to this machine. Raises TrustError."""
        admit_tls(context)

    def believe(self, record: pb.PeerRecord) -> None:  # noqa: B027 (a public swarm has no more to check)
        """Check a record that its peer has signed. Raises TrustError."""

    def trusted(self, certificates: Sequence[bytes]) -> bool:
        """Whether who has shown this chain is still believed: neither revoked nor expired."""
        return True

    def labels_of(self, certificates: Sequence[bytes]) -> dict[str, str]:
        """What the swarm's admins say of the owner of this chain. Raises TrustError."""
        return {}

    async def keep(self, identity: Identity | None) -> None:  # noqa: B027 (a public swarm's keys do not run out)
        """Keep what proves who this machine is from running out, for as long as this runs."""

    @property
    def revocations(self) -> list[pb.RevocationList]:
        """The newest signed lists, to be told to everybody."""
        return []

    def learn(self, revocations: Iterable[pb.RevocationList]) -> None:  # noqa: B027 (nobody is revoked in a public swarm)
        """Take in lists that somebody told; what is old, foreign or forged changes nothing."""


class PublicTrust(Trust):
    """A public swarm: anybody may call; a peer is whoever its signed record says."""

    def __init__(self, identity: Identity | None = None) -> None:
        self._leaf = TlsKey.ephemeral()
        self._presented: dict[str, bytes] = {}
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._certificates = [self_signed(self._leaf, name_of(identity.public_key))] if identity else []

    @property
    def certificates(self) -> list[bytes]:
        return self._certificates

    @property
    def nonce(self) -> bytes:
        return self._nonce

    @property
    def client_id(self) -> bytes:
        return client_id_of(name_of(self._leaf.public_key))

    def server_credentials(self) -> grpc.ServerCredentials:
        return grpc.ssl_server_credentials([(self._leaf.pem, pem_of(self._certificates))])

    def channel(self, record: pb.PeerRecord, address: str, options: Options = CHANNEL_OPTIONS) -> grpc.aio.Channel:
        return pinned(address, record.certificates[0], options)

    @asynccontextmanager
    async def dial(self, address: str, options: Options) -> AsyncIterator[grpc.aio.Channel]:
        """Nothing is known of who is there: what it says must be signed. Its certificate is asked for, then pinned."""
        try:
            if address not in self._presented:
                certificate = await asyncio.wait_for(presented(address), DIAL_S)
                if not is_self_signed(certificate):
                    raise ConnectionError("it is of a private swarm, which lets nobody in but by --join INVITATION")
                self._presented[address] = certificate
            async with pinned(address, self._presented[address], options) as channel:
                yield channel
        except asyncio.TimeoutError:
            raise TimeoutError("it did not answer in time") from None
        except grpc.RpcError:
            self._presented.pop(address, None)  # somebody else may be there by now
            raise

    def hello(self, record: pb.PeerRecord, session_id: bytes) -> pb.Hello:
        signed = _hello_text(record.certificates[0], record.hello_nonce, session_id)
        return pb.Hello(public_key=self._leaf.public_key, signature=self._leaf.sign(signed))

    def principal(self, context: AuthContext, hello: pb.Hello, session_id: bytes) -> Principal:
        signed = _hello_text(self._certificates[0], self._nonce, session_id)
        if not verify_leaf(hello.public_key, hello.signature, signed):
            raise TrustError("the hello is not signed by its EC P-256 key over this peer's certificate and nonce")
        return Principal(name_of(hello.public_key))


def admit_tls(context: AuthContext) -> None:
    """TLS 1.2 is refused at the handshake (see the package's `__init__`); here, too, where gRPC was loaded before."""
    if list(context.get("ssl_tls_version", ())) != [_TLS_VERSION.encode()]:
        raise TrustError(f"connections are {_TLS_VERSION} only")


def client_id_of(name: str) -> bytes:
    """The client id that whoever has this name can prove."""
    return key_hash(name)[:CLIENT_ID_BYTES]


def server_name(certificate: x509.Certificate) -> str:
    """What a certificate calls its owner. Raises ValueError."""
    names = dns_names(certificate)
    if not names:
        raise ValueError("a certificate names nobody")
    return names[0]


def member_name(record: pb.PeerRecord) -> str:
    """What the admins of a private swarm call a verified record's peer; empty in a public one."""
    return server_name(parse_certificate(record.certificates[0])) if len(record.certificates) > 1 else ""


def _hello_text(certificate: bytes, nonce: bytes, session_id: bytes) -> bytes:
    return _HELLO + hashlib.sha256(certificate).digest() + nonce + session_id


def pinned(address: str, certificate: bytes, options: Options) -> grpc.aio.Channel:
    """A channel to the owner of this certificate (DER), and to nobody else. Raises ValueError."""
    name = server_name(parse_certificate(certificate))
    credentials = grpc.ssl_channel_credentials(pem_of([certificate]))
    return grpc.aio.secure_channel(address, credentials, [*options, ("grpc.ssl_target_name_override", name)])


async def presented(address: str) -> bytes:
    """The certificate (DER) that a server shows. Raises OSError."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    _, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=context)
    try:
        certificate: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        server_name(parse_certificate(certificate))
    except ValueError as error:
        raise ConnectionError(f"it is no peer of Petal: {error}") from error
    finally:
        writer.transport.abort()
    return certificate
