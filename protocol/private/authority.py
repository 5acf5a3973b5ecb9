"""An admin's folder: its key and certificate, the root's where it is at hand, invitations, and who was issued what."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from .. import petal_pb2 as pb
from ..paths import data_dir
from ..trust.identity import verify
from ..trust.private_file import write_private
from ..trust.tls_key import X509_ERRORS, TlsKey, is_p256, name_of, pem_of, public_bytes
from ..trust.trust import TrustError
from .certificates import der_of, fingerprint, issue_admin, issue_member, make_root, verify_chain
from .invites import Invite, InviteError, verify_token
from .ledger import Issue, Ledger
from .membership import Membership, identity_text
from .revocations import sign_list

MAX_CSR_BYTES = 2048


class Authority:
    """One admin of one swarm. Answers are read from the folder, which other programs of this machine change, too."""

    def __init__(self, folder: Path) -> None:
        """The admin kept in `folder`. Raises FileNotFoundError, ValueError."""
        self.folder = folder
        self.swarm = folder.name
        about = json.loads((folder / "admin.json").read_text())
        self.address: str = about["address"]
        self.root = x509.load_pem_x509_certificate((folder / "root.pem").read_bytes())
        self.ledger = Ledger(folder / "ledger.sqlite")

    @classmethod
    def init(cls, swarm: str, address: str, folder: Path | None = None) -> Authority:
        """A new swarm: root, first admin, and the admin's own membership. Raises ValueError where there is one."""
        folder = folder or folder_of(swarm)
        if (folder / "root.pem").exists():
            raise ValueError(f"there is a swarm {swarm} already, in {folder}; choose another name")
        root_key, key = TlsKey.ephemeral(), TlsKey.ephemeral()
        root = make_root(root_key, swarm)
        root_key.save(folder / "root.key")
        admin = issue_admin(root_key, root, key.key.public_key(), name_of(key.public_key))
        return cls.store(folder, address, key, root, admin)

    @classmethod
    def store(
        cls, folder: Path, address: str, key: TlsKey, root: x509.Certificate, admin: x509.Certificate
    ) -> Authority:
        """Keep what makes an admin, and make it a member."""
        key.save(folder / "admin.key")
        write_private(folder / "root.pem", pem_of([der_of(root)]))
        write_private(folder / "admin.pem", pem_of([der_of(admin)]))
        write_private(folder / "admin.json", json.dumps({"address": address}).encode())
        self = cls(folder)
        self.join_own_swarm()
        return self

    @property
    def key(self) -> TlsKey:
        return TlsKey.load(self.folder / "admin.key")

    @property
    def certificate(self) -> x509.Certificate:
        return x509.load_pem_x509_certificate((self.folder / "admin.pem").read_bytes())

    @property
    def root_key(self) -> TlsKey:
        """Raises InviteError where the root is kept elsewhere, as it should be."""
        path = self.folder / "root.key"
        if not path.exists():
            raise InviteError(f"this needs the root key: bring it back to {path} for a moment")
        return TlsKey.load(path)

    @property
    def membership(self) -> Membership:
        """The admin's own."""
        return Membership(self.folder / "member")

    def move_to(self, address: str) -> None:
        """Be reached elsewhere: by new invitations, and by members as soon as they are told."""
        if address != self.address:
            self.address = address
            write_private(self.folder / "admin.json", json.dumps({"address": address}).encode())
            self.join_own_swarm()

    def join_own_swarm(self) -> None:
        """Make or renew the admin's own membership."""
        leaf = TlsKey.ephemeral()
        name = name_of(self.key.public_key)
        certificate = issue_member(self.key, self.certificate, leaf.key.public_key(), name, "admin", {})
        issued = pb.Issued(
            certificates=[der_of(certificate), der_of(self.certificate)], root=der_of(self.root), admin=self.members_at
        )
        with contextlib.suppress(FileNotFoundError):  # the first time
            issued.addresses.extend(self.membership.addresses)
        Membership.store(self.folder / "member", leaf, issued)

    @property
    def members_at(self) -> str:
        """Where members reach this admin: one port above where joiners do."""
        host, _, port = self.address.rpartition(":")
        return f"{host}:{int(port) + 1}"

    def invite(self, role: str, labels: Mapping[str, str], uses: int, lifetime_s: float) -> str:
        """A token. Raises InviteError."""
        if role == "admin":
            assert self.root_key, "raises where it is not at hand"
        root = fingerprint(self.root)
        return Invite.new(self.swarm, root, self.key, [self.address], role, labels, uses, lifetime_s).token(self.key)

    def redeem(self, token: str, request: pb.CertificateRequest) -> list[bytes]:
        """Certificates (DER) for a joiner. Raises InviteError, TrustError."""
        invite = verify_token(token, self.key)
        key, name = _applicant(request)
        if invite.role == "admin":
            certificate = issue_admin(self.root_key, self.root, key, name)
            self.ledger.redeem(invite, name)
            self.ledger.record_admin(name, certificate.serial_number, certificate.not_valid_after_utc.timestamp())
            return [der_of(certificate)]
        self.ledger.redeem(invite, name)
        return self._issue(key, name, invite.role, invite.labels)

    def renew(self, request: pb.CertificateRequest, name: str, role: str, labels: Mapping[str, str]) -> list[bytes]:
        """Certificates for a member whose own has been verified. Raises TrustError."""
        key, applicant = _applicant(request)
        if applicant != name or self.ledger.revoked(name):
            raise TrustError("only a member itself renews its membership, and only while it is not revoked")
        return self._issue(key, name, role, labels)

    def revoke(self, name: str) -> Sequence[Issue]:
        """Put all certificates of a member or an admin on the signer's list. Raises InviteError where that is wrong."""
        issues = [issue for issue in self.ledger.issues() if issue.name == name]
        if not issues:
            raise InviteError(f"this admin has issued nothing to {name}")
        admins = issues[0].role == "admin"
        key, issuer = (self.root_key, self.root) if admins else (self.key, self.certificate)
        lists = self.membership.lists
        signer = name_of(key.public_key)
        serials = lists.serials(signer) | {issue.serial for issue in issues}
        self.ledger.revoke(name)
        lists.add(sign_list(key, issuer, lists.number(signer) + 1, serials))
        return issues

    def rotate(self) -> None:
        """A new key and certificate for this admin. Members keep theirs, and get new ones when they renew.

        Raises InviteError. Invitations that are out are void: they were signed with the former key.
        """
        root_key, key = self.root_key, TlsKey.ephemeral()
        admin = issue_admin(root_key, self.root, key.key.public_key(), name_of(key.public_key))
        key.save(self.folder / "admin.key")
        write_private(self.folder / "admin.pem", pem_of([der_of(admin)]))
        self.join_own_swarm()

    def _issue(self, key: ec.EllipticCurvePublicKey, name: str, role: str, labels: Mapping[str, str]) -> list[bytes]:
        certificate = issue_member(self.key, self.certificate, key, name, role, labels)
        chain = [der_of(certificate), der_of(self.certificate)]
        self.ledger.record(verify_chain(self.root, chain, datetime.datetime.now(datetime.timezone.utc)))
        return chain


def folder_of(swarm: str) -> Path:
    """Where the admin of a swarm keeps it. Raises ValueError for a name that is no file's."""
    if not swarm.replace("-", "").replace("_", "").isalnum() or not swarm.isascii() or len(swarm) > 64:
        raise ValueError(f"{swarm!r} is no name for a swarm: at most 64 letters, digits, - and _ are allowed")
    return data_dir() / "swarms" / swarm


def _applicant(request: pb.CertificateRequest) -> tuple[ec.EllipticCurvePublicKey, str]:
    """The TLS key of a request that proves itself, and the name of whose it is. Raises TrustError."""
    try:
        if len(request.csr) > MAX_CSR_BYTES:
            raise ValueError
        csr = x509.load_der_x509_csr(request.csr)
        key = csr.public_key()
        if not csr.is_signature_valid or not is_p256(key):
            raise ValueError
    except X509_ERRORS:
        raise TrustError("the certificate request is not one of an EC P-256 key that signs it") from None
    assert isinstance(key, ec.EllipticCurvePublicKey)
    if not request.identity:
        return key, name_of(public_bytes(key))
    if not verify(request.identity, request.identity_signature, identity_text(request.csr)):
        raise TrustError("the certificate request is not signed by the identity that it names")
    return key, name_of(request.identity)
