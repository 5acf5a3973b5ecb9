"""The certificates of a private swarm: root, admins, members. X.509; the root signs admins, and admins sign members.

`cryptography` builds and verifies them. Ours is only the profile: who may listen, and where role and labels stand.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from ..trust.tls_key import X509_ERRORS, TlsKey, alternative_names, parse_certificate
from ..trust.trust import TrustError, server_name

ROLES = ("peer", "client", "admin")
DAY = datetime.timedelta(days=1)
MEMBER_LIFETIME = 7 * DAY
ADMIN_LIFETIME = 366 * DAY
ROOT_LIFETIME = 3660 * DAY
# Clocks differ.
_BACKDATED = datetime.timedelta(hours=1)
# A second name of whoever listens, for callers who do not know yet whom they will meet.
ANY_MEMBER = "member.petal"
MAX_LABELS = 16
_WORD = re.compile(r"[A-Za-z0-9_-]+")
_ROLE, _LABEL = "petal:role:", "petal:label:"


@dataclass(frozen=True)
class Member:
    """What a verified chain says. `serials`: of the member's certificate and of the admin's who issued it."""

    name: str
    role: str
    labels: tuple[tuple[str, str], ...]
    serials: tuple[int, int]
    not_after: datetime.datetime


def make_root(key: TlsKey, swarm: str) -> x509.Certificate:
    """A root certificate for a swarm of this name."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, swarm)])
    return _authority(key, subject, key.key.public_key(), subject, 1, ROOT_LIFETIME)


def issue_admin(
    root_key: TlsKey, root: x509.Certificate, public_key: ec.EllipticCurvePublicKey, name: str
) -> x509.Certificate:
    """An intermediate that issues members, and no further intermediates."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return _authority(root_key, root.subject, public_key, subject, 0, ADMIN_LIFETIME)


def issue_member(
    key: TlsKey,
    admin: x509.Certificate,
    public_key: ec.EllipticCurvePublicKey,
    name: str,
    role: str,
    labels: Mapping[str, str],
) -> x509.Certificate:
    """A member's certificate for its TLS key; peers and admins may listen, clients only call."""
    listens = role != "client"
    names: list[x509.GeneralName] = [x509.DNSName(name)]
    names += [x509.DNSName(ANY_MEMBER)] if listens else []
    names += [x509.UniformResourceIdentifier(_ROLE + role)]
    names += [x509.UniformResourceIdentifier(f"{_LABEL}{label}={value}") for label, value in sorted(labels.items())]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH] + [ExtendedKeyUsageOID.SERVER_AUTH] * listens
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return (
        _builder(admin.subject, subject, public_key, MEMBER_LIFETIME)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.key.public_key()), critical=False)
        .sign(key.key, hashes.SHA256())
    )


def verify_chain(root: x509.Certificate, chain: Sequence[bytes], now: datetime.datetime) -> Member:
    """Who a chain (DER, the member's first, then the admin's) says somebody is. Raises TrustError.

    Its dates are checked against `now`, revocations are not.
    """
    if len(chain) != 2:
        raise TrustError("a member shows its certificate and its admin's")
    try:
        leaf, admin = (parse_certificate(der) for der in chain)
        verifier = PolicyBuilder().store(Store([root])).time(now).max_chain_depth(1).build_client_verifier()
        verified = verifier.verify(leaf, [admin])
        if len(verified.chain) != 3:
            raise TrustError("a member's certificate is issued by an admin")
        return _member(leaf, admin)
    except (*X509_ERRORS, VerificationError) as error:
        raise TrustError(f"the certificate does not chain to this swarm's root ({error})") from None


@lru_cache(maxsize=4096)
def chain_of_pem(pem: bytes) -> tuple[bytes, ...]:
    """A PEM chain as DER. Raises ValueError."""
    return tuple(der_of(certificate) for certificate in x509.load_pem_x509_certificates(pem))


def der_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def fingerprint(certificate: x509.Certificate) -> str:
    """What a token pins a root by."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def parse_label(text: str) -> tuple[str, str]:
    """`lab=oxford` as a pair. Raises ValueError."""
    label, equals, value = text.partition("=")
    if not equals or not _WORD.fullmatch(label) or not _WORD.fullmatch(value):
        raise ValueError(f"{text!r} is no label: give one such as lab=oxford, of letters, digits, - and _")
    if len(text) > 128:
        raise ValueError(f"{text!r} is too long for a label: at most 128 characters are allowed")
    return label, value


def _member(leaf: x509.Certificate, admin: x509.Certificate) -> Member:
    names = alternative_names(leaf)
    texts = names.get_values_for_type(x509.UniformResourceIdentifier) if names else []
    roles = [text.removeprefix(_ROLE) for text in texts if text.startswith(_ROLE)]
    labels = [text.removeprefix(_LABEL) for text in texts if text.startswith(_LABEL)]
    if len(roles) != 1 or roles[0] not in ROLES or len(labels) > MAX_LABELS:
        raise TrustError(f"a member's certificate names one role of {', '.join(ROLES)} and at most {MAX_LABELS} labels")
    return Member(
        name=server_name(leaf),
        role=roles[0],
        labels=tuple(parse_label(label) for label in labels),
        serials=(leaf.serial_number, admin.serial_number),
        not_after=min(leaf.not_valid_after_utc, admin.not_valid_after_utc),
    )


def _authority(
    key: TlsKey,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    path_length: int,
    lifetime: datetime.timedelta,
) -> x509.Certificate:
    return (
        _builder(issuer, subject, public_key, lifetime)
        .add_extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.key.public_key()), critical=False)
        .sign(key.key, hashes.SHA256())
    )


def _builder(
    issuer: x509.Name, subject: x509.Name, public_key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(issuer, subject, public_key, x509.random_serial_number())
    return builder.not_valid_before(now - _BACKDATED).not_valid_after(now + lifetime)


def _usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
