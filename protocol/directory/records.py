"""Peer records: what a peer says of itself, signed, and everything a reader checks before believing it."""

from __future__ import annotations

import hashlib
import ipaddress
import math
import re
import time
from collections.abc import Iterable

from google.protobuf.message import DecodeError

from .. import petal_pb2 as pb
from ..errors import PetalError
from ..trust.identity import Identity, peer_id_of, verify
from ..trust.tls_key import name_of, parse_certificate
from ..trust.trust import NONCE_BYTES, server_name

MAX_BYTES = 64 * 1024  # of a whole SignedRecord
MAX_LIFETIME_S = 600.0
CLOCK_SKEW_S = 3.0
MAX_BLOCKS = 4096
MAX_ADDRESSES = 8
DIGEST_BYTES = 32
_DOMAIN = b"petal peer record 1\0"
# The same record comes back from every replica and every look-up: it is worth checking once.
_KNOWN_GOOD = 8192
_known_good: dict[bytes, None] = {}
_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*")
_PORT = re.compile(r"[1-9][0-9]{0,4}")


class RecordError(PetalError, ValueError):
    """Why a record is not to be believed, in one sentence."""


def sign_record(identity: Identity, record: pb.PeerRecord) -> pb.SignedRecord:
    """Sign what `identity` says of itself."""
    assert record.peer_id == identity.peer_id, "a peer signs only its own record"
    data = record.SerializeToString(deterministic=True)
    return pb.SignedRecord(record=data, public_key=identity.public_key, signature=identity.sign(_DOMAIN + data))


def parse_signed(data: bytes) -> pb.SignedRecord:
    """A SignedRecord from untrusted bytes, not verified yet."""
    _require(len(data) <= MAX_BYTES, f"A record has {len(data)} bytes, at most {MAX_BYTES} are allowed")
    try:
        return pb.SignedRecord.FromString(data)
    except DecodeError:
        raise RecordError("A signed record does not parse.") from None


def verify_record(signed: pb.SignedRecord, *, now: float | None = None) -> pb.PeerRecord:
    """The record inside, once its signature, its fields and its expiry are found good; else RecordError."""
    record = authenticate(signed)
    now = time.time() if now is None else now
    _require(record.expires_at > now - CLOCK_SKEW_S, f"The record of {record.peer_id} expired")
    _require(
        record.expires_at < now + MAX_LIFETIME_S + CLOCK_SKEW_S,
        f"The record of {record.peer_id} claims to live longer than {MAX_LIFETIME_S:.0f} s",
    )
    return record


def authenticate(signed: pb.SignedRecord) -> pb.PeerRecord:
    """The record inside, once its signature and its fields are found good, whenever it expires; else RecordError."""
    _require(signed.ByteSize() <= MAX_BYTES, f"A record has {signed.ByteSize()} bytes, at most {MAX_BYTES} are allowed")
    digest = hashlib.sha256(signed.SerializeToString(deterministic=True)).digest()
    if digest in _known_good:
        return pb.PeerRecord.FromString(signed.record)
    record = _check(signed)
    _known_good[digest] = None
    if len(_known_good) > _KNOWN_GOOD:
        del _known_good[next(iter(_known_good))]  # the oldest
    return record


def fresher(a: pb.PeerRecord, b: pb.PeerRecord) -> bool:
    """Whether `a` replaces `b`, an earlier or later record of the same peer."""
    return (a.version, a.expires_at) > (b.version, b.expires_at)


def tombstone(record: pb.PeerRecord) -> pb.PeerRecord:
    """The record that replaces `record` once its peer has left; it outlives it, so that no replay revives the peer."""
    gone = pb.PeerRecord()
    gone.CopyFrom(record)
    gone.state, gone.version, gone.expires_at = pb.LEFT, record.version + 1, record.expires_at + 1
    return gone


def is_address(text: str) -> bool:
    """Whether `text` is host:port, the host being a name, an IPv4 address or an IPv6 address in brackets."""
    host, colon, port = text.rpartition(":")
    if not colon or not _PORT.fullmatch(port) or int(port) > 65535:
        return False
    if host.startswith("[") and host.endswith("]"):
        return _is_ip(host[1:-1], ipaddress.IPv6Address)
    if re.fullmatch(r"[0-9.]+", host):
        return _is_ip(host, ipaddress.IPv4Address)
    return len(host) <= 253 and _HOST_NAME.fullmatch(host) is not None


def _check(signed: pb.SignedRecord) -> pb.PeerRecord:
    owner = peer_id_of(signed.public_key)
    authentic = verify(signed.public_key, signed.signature, _DOMAIN + signed.record)
    _require(authentic, f"The record of {owner} is not signed by its RSA key of 2048 bits or more")
    try:
        record = pb.PeerRecord.FromString(signed.record)
    except DecodeError:
        raise RecordError(f"The record of {owner} does not parse.") from None
    _require(record.peer_id == owner, f"A record signed by {owner} names another peer")
    _check_fields(record)
    _check_certificates(record, name_of(signed.public_key))
    return record


def _is_ip(text: str, kind: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _check_fields(record: pb.PeerRecord) -> None:
    def require(good: bool, wrong: str) -> None:
        _require(good, f"The record of {record.peer_id} {wrong}")

    require(record.state in pb.PeerState.values() and record.state != 0, f"has the unknown state {record.state}")
    require(
        record.start < record.end <= record.n_blocks <= MAX_BLOCKS,
        f"hosts [{record.start}, {record.end}) of {record.n_blocks} blocks, which is no span of at most {MAX_BLOCKS}",
    )
    require(record.protocol_min <= record.protocol_max, "has an empty protocol range")
    require(record.cache_tokens_free <= record.cache_tokens, "has more free cache than cache")
    require(math.isfinite(record.expires_at), "expires at no finite time")
    require(math.isfinite(record.throughput) and record.throughput >= 0, "has a throughput that is no finite number")
    _check_strings(record)
    _check_digests(record)


def _check_strings(record: pb.PeerRecord) -> None:
    def require(texts: Iterable[str], count: int, length: int, what: str) -> None:
        texts = list(texts)
        good = len(texts) <= count and all(0 < len(text) <= length and text.isprintable() for text in texts)
        allowed = f"at most {count} printable ones of 1 to {length} characters are allowed"
        _require(good, f"The record of {record.peer_id} has bad {what}: {allowed}")

    require([record.model], 1, 256, "model names")
    require(filter(None, [record.dtype, record.quantization, record.numerics]), 3, 64, "format names")
    require(record.addresses, MAX_ADDRESSES, 260, "addresses")
    require(record.multiaddrs, 16, 512, "multiaddrs")
    require(record.features, 64, 64, "features")
    for address in record.addresses:
        _require(is_address(address), f"The record of {record.peer_id} has the address {address!r}, not host:port")


def _check_digests(record: pb.PeerRecord) -> None:
    def require(good: bool, wrong: str) -> None:
        _require(good, f"The record of {record.peer_id} {wrong}")

    blocks = record.end - record.start
    require(len(record.model_digest) == DIGEST_BYTES, f"has no model digest of {DIGEST_BYTES} bytes")
    require(
        len(record.block_digests) in (0, blocks),
        f"has {len(record.block_digests)} block digests for {blocks} blocks",
    )
    optional = filter(None, [record.embedding_digest, record.norm_digest, record.head_digest])
    sizes = {len(digest) for digest in [*record.block_digests, *optional]}
    require(sizes <= {DIGEST_BYTES}, f"has a digest that is not {DIGEST_BYTES} bytes long")


def _check_certificates(record: pb.PeerRecord, name: str) -> None:
    try:
        chain = [parse_certificate(der) for der in record.certificates]
        good = 1 <= len(chain) <= 2 and server_name(chain[0]) == name
    except ValueError as error:
        raise RecordError(f"The record of {record.peer_id} is not to be used: {error}.") from None
    _require(good, f"The record of {record.peer_id} has no TLS certificate of its own key's name")
    _require(len(record.hello_nonce) in (0, NONCE_BYTES), f"The record of {record.peer_id} has a bad hello nonce")


def _require(good: bool, sentence: str) -> None:
    if not good:
        raise RecordError(sentence + ".")
