"""Being a member of a private swarm: a folder with key, certificates and revocation lists, and the trust they give."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from .. import petal_pb2 as pb
from ..petal_pb2_grpc import AdminStub
from ..trust.identity import Identity
from ..trust.private_file import write_private
from ..trust.tls_key import TlsKey, name_of, parse_certificate, pem_of, public_bytes
from ..trust.trust import AuthContext, Options, Principal, Trust, TrustError, client_id_of, server_name
from ..wire.limits import CHANNEL_OPTIONS, DIRECTORY_OPTIONS
from .certificates import ANY_MEMBER, MEMBER_LIFETIME, Member, chain_of_pem, der_of, verify_chain
from .invites import Invite
from .revocations import RevocationLists
from .rotating_credentials import KeyAndChain, credentials_of

log = logging.getLogger(__name__)

RENEW_TIMEOUT_S = 10.0
# How often a member asks itself whether to renew.
LOOK_S = 60.0
MAX_ADDRESSES = 64
_IDENTITY = b"petal member identity 1\0"
_KNOWN_CHAINS = 4096


class Membership(Trust):
    """A private swarm: everybody on either end of a call shows a certificate that chains to the root."""

    def __init__(self, folder: Path) -> None:
        """The membership kept in `folder`. Raises OSError, ValueError."""
        self.folder = folder
        self.root = x509.load_pem_x509_certificate((folder / "root.pem").read_bytes())
        self._key = TlsKey.load(folder / "key.pem")
        self._chain = list(chain_of_pem((folder / "chain.pem").read_bytes()))
        self.lists = RevocationLists(self.root, folder / "revocations")
        self._known: dict[tuple[bytes, ...], Member] = {}
        about = json.loads((folder / "swarm.json").read_text())
        self.admin: str = about["admin"]
        self.addresses: list[str] = about["addresses"]
        self.name = server_name(parse_certificate(self._chain[0]))

    @classmethod
    def store(cls, folder: Path, key: TlsKey, issued: pb.Issued) -> Membership:
        """Keep what an admin has issued, whose certificates the caller has verified."""
        key.save(folder / "key.pem")
        write_private(folder / "root.pem", pem_of([issued.root]))
        about = {"admin": issued.admin, "addresses": list(issued.addresses[:MAX_ADDRESSES])}
        write_private(folder / "swarm.json", json.dumps(about).encode())
        write_private(folder / "chain.pem", pem_of(issued.certificates))
        membership = cls(folder)
        membership.learn(issued.revocations)
        return membership

    @property
    def root_der(self) -> bytes:
        return der_of(self.root)

    @property
    def valid(self) -> bool:
        """Whether one's own certificate is."""
        return self.trusted(self._chain)

    def remember(self, addresses: Sequence[str]) -> None:
        """Keep where members are, so that one finds them again whoever else is away."""
        if addresses and list(addresses) != self.addresses:
            self.addresses = list(addresses[:MAX_ADDRESSES])
            about = {"admin": self.admin, "addresses": self.addresses}
            write_private(self.folder / "swarm.json", json.dumps(about).encode())

    def find_admin(self, invite: Invite) -> None:
        """Look for the admin where a newer invitation says, if it is the admin's that this membership is of."""
        host, _, port = invite.addresses[0].rpartition(":")
        admin = f"{host}:{int(port) + 1}"
        signers = {name_of(public_bytes(parse_certificate(der).public_key())) for der in self._chain[1:]}  # type: ignore[arg-type]
        if admin != self.admin and invite.admin in signers:
            self.admin = admin
            about = {"admin": admin, "addresses": self.addresses}
            write_private(self.folder / "swarm.json", json.dumps(about).encode())

    # Renewing.

    @property
    def due(self) -> bool:
        """Whether half of one's certificate's life is over."""
        left = parse_certificate(self._chain[0]).not_valid_after_utc - _now()
        return left < MEMBER_LIFETIME / 2

    async def keep(self, identity: Identity | None) -> None:
        """Renew whenever it is due, for ever; an admin who is away is asked again later."""
        while True:
            if self.due:
                try:
                    await self.renew(identity)
                except (grpc.RpcError, TrustError) as error:
                    log.warning("the membership runs out at %s: %s", self._until, error)
            await asyncio.sleep(LOOK_S)

    async def renew(self, identity: Identity | None) -> None:
        """A new key and a new certificate for it from the admin. Raises RpcError, TrustError."""
        # A client's TLS key is its name: it stays.
        key = TlsKey.ephemeral() if identity else self._key
        async with self.dial(self.admin, DIRECTORY_OPTIONS) as channel:
            issued = await AdminStub(channel).Renew(request_for(key, identity), timeout=RENEW_TIMEOUT_S)
        self.adopt(key, issued.certificates)

    def adopt(self, key: TlsKey, certificates: Sequence[bytes]) -> None:
        """Go over to a new certificate: new connections show it. Raises TrustError."""
        if verify_chain(self.root, certificates, _now()).name != self.name:
            raise TrustError("the admin issued a certificate for somebody else")
        self._key, self._chain = key, list(certificates)
        key.save(self.folder / "key.pem")
        write_private(self.folder / "chain.pem", pem_of(certificates))

    @property
    def _until(self) -> datetime.datetime:
        return parse_certificate(self._chain[0]).not_valid_after_utc

    # Trust.

    @property
    def certificates(self) -> list[bytes]:
        return self._chain

    @property
    def client_id(self) -> bytes:
        return client_id_of(self.name)

    def server_credentials(self) -> grpc.ServerCredentials:
        """Asks every caller for a certificate; what it shows itself is new as soon as the membership is renewed."""
        return credentials_of(self._key_and_chain, pem_of([self.root_der]))

    def channel(self, record: pb.PeerRecord, address: str, options: Options = CHANNEL_OPTIONS) -> grpc.aio.Channel:
        return self._secure(address, server_name(parse_certificate(record.certificates[0])), options)

    def dial(self, address: str, options: Options) -> AbstractAsyncContextManager[grpc.aio.Channel]:
        return self._secure(address, ANY_MEMBER, options)

    def hello(self, record: pb.PeerRecord, session_id: bytes) -> None:
        """The certificate says it."""

    def principal(self, context: AuthContext, hello: pb.Hello, session_id: bytes) -> Principal:
        return self._principal(context)

    def admit(self, context: AuthContext) -> None:
        super().admit(context)
        self._principal(context)

    def believe(self, record: pb.PeerRecord) -> None:
        if self._member(record.certificates).role != "peer":
            raise TrustError("it is signed by a member that is no peer")

    def trusted(self, certificates: Sequence[bytes]) -> bool:
        try:
            self._member(certificates)
        except TrustError:
            return False
        return True

    @property
    def revocations(self) -> list[pb.RevocationList]:
        return self.lists.messages

    def learn(self, revocations: Iterable[pb.RevocationList]) -> None:
        for message in revocations:
            try:
                self.lists.add(message)
            except TrustError as error:
                log.debug("refused a revocation list: %s", error)

    def labels_of(self, certificates: Sequence[bytes]) -> dict[str, str]:
        return dict(self._member(certificates).labels)

    def reload(self) -> None:
        """Take in what other programs of this machine have written into the folder."""
        self.lists.reload()
        with contextlib.suppress(OSError, ValueError):  # it is being written
            chain = list(chain_of_pem((self.folder / "chain.pem").read_bytes()))
            if chain != self._chain:
                self._key, self._chain = TlsKey.load(self.folder / "key.pem"), chain

    def _principal(self, context: AuthContext) -> Principal:
        shown = [pem for name in ("x509_pem_cert", "x509_pem_cert_chain") for pem in context.get(name, ())]
        try:
            chain = tuple(dict.fromkeys(der for pem in shown for der in chain_of_pem(pem)))
        except ValueError:
            chain = ()
        member = self._member(chain)
        return Principal(member.name, member.role, member.labels, chain)

    def _member(self, certificates: Sequence[bytes]) -> Member:
        """Who has this chain, if neither expired nor revoked. Raises TrustError."""
        chain = tuple(certificates)
        member = self._known.get(chain)
        if member is None or member.not_after < _now():
            member = verify_chain(self.root, chain, _now())
            self._known[chain] = member
            if len(self._known) > _KNOWN_CHAINS:
                del self._known[next(iter(self._known))]
        if self.lists.revoked(member):
            raise TrustError("its membership was revoked")
        return member

    def _key_and_chain(self) -> KeyAndChain:
        return self._key.pem, pem_of(self._chain)

    def _secure(self, address: str, name: str, options: Options) -> grpc.aio.Channel:
        credentials = grpc.ssl_channel_credentials(pem_of([der_of(self.root)]), self._key.pem, pem_of(self._chain))
        return grpc.aio.secure_channel(address, credentials, [*options, ("grpc.ssl_target_name_override", name)])


def request_for(key: TlsKey, identity: Identity | None) -> pb.CertificateRequest:
    """Ask for a certificate of `key`, in the name of the identity, where there is one, or of the key itself."""
    name = name_of(identity.public_key if identity else key.public_key)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    csr = x509.CertificateSigningRequestBuilder(subject).sign(key.key, hashes.SHA256())
    der = csr.public_bytes(serialization.Encoding.DER)
    if identity is None:
        return pb.CertificateRequest(csr=der)
    return pb.CertificateRequest(
        csr=der, identity=identity.public_key, identity_signature=identity.sign(_IDENTITY + der)
    )


def identity_text(csr: bytes) -> bytes:
    """What an identity signs when it asks for a certificate."""
    return _IDENTITY + csr


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
