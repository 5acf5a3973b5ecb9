"""A peer's identity: the RSA key that is its libp2p id and signs what it says."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from .private_file import write_private

KEY_BITS = 2048
MAX_KEY_BITS = 4096  # larger ones only cost their readers time
MAX_KEY_BYTES = 1024
_EXPONENT = 65537
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_RSA_FIELD, _DATA_FIELD = b"\x08\x00", b"\x12"  # protobuf: key_type = RSA, then the key's bytes
_SHA256_MULTIHASH = b"\x12\x20"
_PADDING = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=padding.PSS.DIGEST_LENGTH)


class Identity:
    """An RSA key pair, stored in the file format of libp2p: the DHT daemon reads the same file."""

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.peer_id = peer_id_of(self.public_key)

    @classmethod
    def ephemeral(cls) -> Identity:
        """A new identity that is stored nowhere."""
        return cls(rsa.generate_private_key(_EXPONENT, KEY_BITS))

    @classmethod
    def load_or_create(cls, path: str | os.PathLike[str]) -> Identity:
        """The identity in the file at `path`, which is made on first use; ValueError if it holds something else."""
        path = Path(path)
        if path.exists():
            return cls._load(path)
        identity = cls.ephemeral()
        identity._save(path)
        return identity

    def sign(self, data: bytes) -> bytes:
        """Sign `data`; callers begin it with a prefix of their own, so that no signature fits two purposes."""
        return self._key.sign(data, _PADDING, hashes.SHA256())

    @classmethod
    def _load(cls, path: Path) -> Identity:
        try:
            key = serialization.load_der_private_key(_unwrap(path.read_bytes()), password=None)
            if not isinstance(key, rsa.RSAPrivateKey) or key.key_size < KEY_BITS:
                raise ValueError
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise ValueError(
                f"{path} is not an identity file of {KEY_BITS}-bit RSA: restore it from a backup, "
                "or delete it to get a new identity (and a new peer id)."
            ) from None
        return cls(key)

    def _save(self, path: Path) -> None:
        der = self._key.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        )
        write_private(path, _wrap(der))


def peer_id_of(public_key: bytes) -> str:
    """The libp2p id of a DER public key: the multihash of its protobuf form, in base58."""
    return _base58(_SHA256_MULTIHASH + hashlib.sha256(_wrap(public_key)).digest())


def verify(public_key: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the RSA key (DER, 2048 to 4096 bits) made `signature` over `data`. Never raises on hostile input."""
    if len(public_key) > MAX_KEY_BYTES:
        return False
    try:
        key = serialization.load_der_public_key(public_key)
        if not isinstance(key, rsa.RSAPublicKey) or not _is_usual(key):
            return False
        key.verify(signature, data, _PADDING, hashes.SHA256())
    except (ValueError, UnsupportedAlgorithm, InvalidSignature):
        return False
    return True


def _is_usual(key: rsa.RSAPublicKey) -> bool:
    return KEY_BITS <= key.key_size <= MAX_KEY_BITS and key.public_numbers().e == _EXPONENT


def _wrap(key: bytes) -> bytes:
    size, length = len(key), bytearray()
    while size > 0x7F:
        length.append(size & 0x7F | 0x80)
        size >>= 7
    length.append(size)
    return _RSA_FIELD + _DATA_FIELD + bytes(length) + key


def _unwrap(message: bytes) -> bytes:
    header = len(_RSA_FIELD + _DATA_FIELD)
    while header < len(message) and message[header] & 0x80:
        header += 1
    key = message[header + 1 :]
    if message != _wrap(key):
        raise ValueError
    return key


def _base58(data: bytes) -> str:
    """Own code: six lines, for which no light client should need a package."""
    number, digits = int.from_bytes(data, "big"), ""
    while number:
        number, digit = divmod(number, len(_BASE58))
        digits = _BASE58[digit] + digits
    return digits  # a multihash never begins with a zero byte, which would need padding
