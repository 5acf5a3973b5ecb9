"""Revocation lists of a private swarm: one a signer (root, admins), each with a number that only rises. X.509 CRLs.

They are looked up here, for neither the verifier of `cryptography` nor Python's gRPC takes in any.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from google.protobuf.message import DecodeError

from .. import petal_pb2 as pb
from ..trust.private_file import write_private
from ..trust.tls_key import X509_ERRORS, TlsKey, is_p256, name_of, parse_certificate, public_bytes
from ..trust.trust import TrustError
from .certificates import Member

MAX_LIST_BYTES = 256 << 10
MAX_SIGNERS = 256
# Lists do not run out: whoever has heard of a revocation keeps to it. X.509 wants a date.
_NEXT_UPDATE = datetime.timedelta(days=3660)


class RevocationLists:
    """The newest list of every signer; a member that any of them names is revoked.

    Admins are revoked by the root alone, and with an admin goes everybody it has issued: dates can be forged.
    """

    def __init__(self, root: x509.Certificate, folder: Path) -> None:
        self._root = root
        self._folder = folder
        self._lists: dict[str, tuple[int, pb.RevocationList, frozenset[int]]] = {}
        self._of_root = name_of(public_bytes(root.public_key()))  # type: ignore[arg-type]
        self._members: frozenset[int] = frozenset()
        self.reload()

    @property
    def messages(self) -> list[pb.RevocationList]:
        """The newest lists, to be told to everybody."""
        return [message for _, message, _ in self._lists.values()]

    def revoked(self, member: Member) -> bool:
        own, admins = member.serials
        return own in self._members or admins in self.serials(self._of_root)

    def number(self, signer: str) -> int:
        """The number of a signer's newest list, by the name of its key."""
        return self._lists[signer][0] if signer in self._lists else 0

    def serials(self, signer: str) -> frozenset[int]:
        """What a signer's newest list names."""
        return self._lists[signer][2] if signer in self._lists else frozenset()

    def reload(self) -> None:
        """Take in what the folder holds: on start, and where another program of this machine has added to it."""
        for path in self._folder.glob("*.list"):
            try:
                self._take(pb.RevocationList.FromString(path.read_bytes()))
            except (OSError, DecodeError, TrustError):
                continue  # somebody is about to replace it; others tell it again

    def add(self, message: pb.RevocationList) -> bool:
        """Take in and keep a list; False where it is no news. Raises TrustError for one not to be believed."""
        signer = self._take(message)
        if signer:
            write_private(self._folder / f"{signer}.list", message.SerializeToString())
        return bool(signer)

    def _take(self, message: pb.RevocationList) -> str:
        signer, number, serials = _verified(message, self._root)
        if number <= self.number(signer):
            return ""
        if signer not in self._lists and len(self._lists) >= MAX_SIGNERS:
            raise TrustError(f"more than {MAX_SIGNERS} signers have revocation lists")
        self._lists[signer] = number, message, serials
        self._members = frozenset[int]().union(*(serials for _, _, serials in self._lists.values()))
        return signer


def sign_list(key: TlsKey, issuer: x509.Certificate, number: int, serials: Iterable[int]) -> pb.RevocationList:
    """A signer's whole list; `issuer` is its certificate, the root's own or an admin's."""
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateRevocationListBuilder(issuer.subject, now, now + _NEXT_UPDATE)
    builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    for serial in sorted(serials):
        builder = builder.add_revoked_certificate(x509.RevokedCertificateBuilder(serial, now).build())
    crl = builder.sign(key.key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)
    by_root = issuer.subject == issuer.issuer
    return pb.RevocationList(crl=crl, issuer=b"" if by_root else issuer.public_bytes(serialization.Encoding.DER))


def _verified(message: pb.RevocationList, root: x509.Certificate) -> tuple[str, int, frozenset[int]]:
    """Signer, number and serials of a list from untrusted bytes. Raises TrustError."""
    if len(message.crl) > MAX_LIST_BYTES:
        raise TrustError(f"a revocation list has {len(message.crl)} bytes, at most {MAX_LIST_BYTES} are allowed")
    try:
        issuer = parse_certificate(message.issuer) if message.issuer else root
        if message.issuer:
            issuer.verify_directly_issued_by(root)
            if not issuer.extensions.get_extension_for_class(x509.BasicConstraints).value.ca:
                raise TrustError("a revocation list is signed by a member, not by an admin")
        crl = x509.load_der_x509_crl(message.crl)
        key = issuer.public_key()
        assert is_p256(key)
        if not crl.is_signature_valid(key):  # type: ignore[arg-type]
            raise TrustError("a revocation list is not signed by its issuer")
        number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        serials = frozenset(entry.serial_number for entry in crl)
    except X509_ERRORS as error:
        raise TrustError(f"a revocation list is not to be believed ({error})") from None
    return name_of(public_bytes(key)), number, serials  # type: ignore[arg-type]
