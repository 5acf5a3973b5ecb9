"""A TLS key: EC P-256, since grpcio cannot shake hands with others (Ed25519 fails); and the names in certificates."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from .private_file import write_private

MAX_CERTIFICATE_BYTES = 4096
# What hostile bytes can make of X.509, as the library says it.
X509_ERRORS = (
    ValueError,
    TypeError,
    InvalidSignature,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)
_ECDSA = ec.ECDSA(hashes.SHA256())
_DAY = datetime.timedelta(days=1)
# Whoever pins this certificate does so for as long as the record that it is in lives.
_PUBLIC_LIFETIME = 3650 * _DAY


class TlsKey:
    """An EC P-256 key pair."""

    def __init__(self, key: ec.EllipticCurvePrivateKey) -> None:
        self.key = key
        self.public_key = public_bytes(key.public_key())

    @classmethod
    def ephemeral(cls) -> TlsKey:
        return cls(ec.generate_private_key(ec.SECP256R1()))

    @classmethod
    def load(cls, path: Path) -> TlsKey:
        """Raises ValueError, OSError."""
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError(f"{path} is no EC P-256 key: restore it from a backup.")
        return cls(key)

    def save(self, path: Path) -> None:
        """Readable by its owner alone."""
        write_private(path, self.pem)

    @property
    def pem(self) -> bytes:
        return self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def sign(self, data: bytes) -> bytes:
        """Sign `data`; callers begin it with a prefix of their own, so that no signature fits two purposes."""
        return self.key.sign(data, _ECDSA)


def verify_leaf(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the EC P-256 key (DER) made `signature` over `data`. Never raises on hostile input."""
    if len(public_key) > 128:
        return False
    try:
        key = serialization.load_der_public_key(public_key)
        if not is_p256(key):
            return False
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(signature, data, _ECDSA)
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        return False
    return True


def is_p256(key: object) -> bool:
    return isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def name_of(public_key: bytes) -> str:
    """The DNS name of a key (DER): its hash in lower-case base32, as DNS knows no upper case."""
    return base64.b32encode(hashlib.sha256(public_key).digest()).decode().rstrip("=").lower()


def key_hash(name: str) -> bytes:
    """The hash (32 bytes) that a name was made of."""
    return base64.b32decode(name.upper() + "=" * (-len(name) % 8))


def self_signed(leaf: TlsKey, name: str) -> bytes:
    """The certificate (DER) that a peer of a public swarm shows; the peer's signed record vouches for it."""
    now = datetime.datetime.now(datetime.timezone.utc)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder(subject, subject, leaf.key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _PUBLIC_LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(leaf.key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.DER)


def parse_certificate(der: bytes) -> x509.Certificate:
    """A certificate of an EC P-256 key, from untrusted bytes. Raises ValueError."""
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise ValueError(f"a certificate has {len(der)} bytes, at most {MAX_CERTIFICATE_BYTES} are allowed")
    try:
        certificate = x509.load_der_x509_certificate(der)
        good = is_p256(certificate.public_key())
    except X509_ERRORS as error:
        raise ValueError(f"a certificate does not parse ({error})") from None
    if not good:
        raise ValueError("a certificate is of another key than EC P-256")
    return certificate


def is_self_signed(der: bytes) -> bool:
    """Whether a certificate vouches for itself, as peers of public swarms show them. Raises ValueError."""
    certificate = parse_certificate(der)
    return certificate.issuer == certificate.subject


def dns_names(certificate: x509.Certificate) -> Sequence[str]:
    """Raises ValueError where its extensions do not parse."""
    names = alternative_names(certificate)
    return names.get_values_for_type(x509.DNSName) if names else ()


def alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    """Raises ValueError where its extensions do not parse."""
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    except X509_ERRORS as error:
        raise ValueError(f"a certificate's extensions are bad: {error}") from None


def pem_of(certificates: Sequence[bytes]) -> bytes:
    """A chain of DER certificates as PEM."""
    return b"".join(
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
        for der in certificates
    )
