import math
import time
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from petal.protocol import petal_pb2 as pb
from petal.protocol.directory.records import (
    MAX_BYTES,
    RecordError,
    fresher,
    is_address,
    parse_signed,
    sign_record,
    tombstone,
    verify_record,
)
from petal.protocol.trust.identity import Identity

from .records_for_tests import good_record, signed_record

IDENTITY = Identity.ephemeral()
GOOD = signed_record(IDENTITY, expires_at=time.time() + 300)


def refuse(signed, match, **kwargs):
    with pytest.raises(RecordError, match=match) as caught:
        verify_record(signed, **kwargs)
    assert str(caught.value).endswith(".")


def test_a_good_record_passes_again_and_again():
    good = signed_record(IDENTITY)  # made now: the module's own may have expired in a long run
    for _ in range(2):
        record = verify_record(parse_signed(good.SerializeToString()))
        assert record.peer_id == IDENTITY.peer_id
        record.model = "changed by its reader"
    assert verify_record(good).model == "tiny"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"start": 4}, "span"),
        ({"end": 9}, "span"),
        ({"n_blocks": 1 << 20, "block_digests": []}, "span"),
        ({"addresses": ["nowhere"]}, "not host:port"),
        ({"addresses": ["127.0.0.1:80"] * 9}, "bad addresses"),
        ({"multiaddrs": ["/ip4/" + "1" * 600]}, "bad multiaddrs"),
        ({"model": ""}, "model name"),
        ({"model": "x" * 257}, "model name"),
        ({"model": "line\nbreak"}, "model name"),
        ({"quantization": "\x1b[31m"}, "format name"),
        ({"features": ["x"] * 65}, "bad features"),
        ({"model_digest": b""}, "model digest"),
        ({"block_digests": [b"b" * 32]}, "block digests"),
        ({"block_digests": [b"b" * 32, b"b"]}, "not 32 bytes"),
        ({"head_digest": b"h"}, "not 32 bytes"),
        ({"throughput": math.nan}, "throughput"),
        ({"throughput": math.inf}, "throughput"),
        ({"throughput": -1.0}, "throughput"),
        ({"expires_at": math.nan}, "no finite time"),
        ({"expires_at": math.inf}, "no finite time"),
        ({"state": pb.PEER_STATE_UNSPECIFIED}, "unknown state"),
        ({"state": 77}, "unknown state"),
        ({"protocol_min": 2, "protocol_max": 1}, "protocol range"),
        ({"cache_tokens_free": 1}, "free cache"),
    ],
)
def test_wrong_fields_are_named(changes, match):
    refuse(signed_record(IDENTITY, **changes), match)


def test_time():
    now = time.time()
    refuse(signed_record(IDENTITY, expires_at=now - 5), "expired")
    refuse(signed_record(IDENTITY, expires_at=now + 610), "longer")
    refuse(GOOD, "expired", now=now + 400)
    verify_record(signed_record(IDENTITY, expires_at=now - 1))  # within the clocks' skew
    verify_record(signed_record(IDENTITY, expires_at=now + 600))


def test_forgeries():
    other = Identity.ephemeral()
    stolen = pb.SignedRecord(record=GOOD.record, public_key=other.public_key, signature=other.sign(GOOD.record))
    refuse(stolen, "not signed")
    data = good_record(other).SerializeToString()
    domain = b"petal peer record 1\0"
    foreign = pb.SignedRecord(record=data, public_key=IDENTITY.public_key, signature=IDENTITY.sign(domain + data))
    refuse(foreign, "names another peer")
    without_domain = pb.SignedRecord(
        record=GOOD.record, public_key=IDENTITY.public_key, signature=IDENTITY.sign(GOOD.record)
    )
    refuse(without_domain, "not signed")
    junk = b"\xff" * 9
    refuse(
        pb.SignedRecord(record=junk, public_key=IDENTITY.public_key, signature=IDENTITY.sign(domain + junk)),
        "does not parse",
    )


def test_size():
    refuse(pb.SignedRecord(record=bytes(MAX_BYTES), public_key=GOOD.public_key), "bytes, at most")
    with pytest.raises(RecordError, match="bytes, at most"):
        parse_signed(bytes(MAX_BYTES + 1))


def test_the_fresher_record_is_of_the_later_version():
    old, new = good_record(IDENTITY, version=1, expires_at=9e9), good_record(IDENTITY, version=2, expires_at=1.0)
    assert fresher(new, old)
    assert not fresher(old, new)
    assert not fresher(old, old)
    gone = tombstone(new)
    assert fresher(gone, new)
    assert gone.state == pb.LEFT
    assert gone.expires_at > new.expires_at
    assert verify_record(sign_record(IDENTITY, tombstone(good_record(IDENTITY)))).state == pb.LEFT


@pytest.mark.parametrize("good", ["1.2.3.4:1", "[2001:db8::1]:65535", "localhost:80", "a-b.example.org:31330", "x_y:1"])
def test_addresses(good):
    assert is_address(good)


BAD_NUMBERS = ["host:", "host:0", "host:65536", "host:080", "h:８０", "1.2.3:80", "1.2.3.999:80", "::1:80", "[::1]80"]
BAD_NAMES = ["", ":80", "host", "a b:80", "http://host:80", "-x:80", "x-:80", "a..b:80", "[host]:80", "host:80\n"]


@pytest.mark.parametrize("bad", [*BAD_NUMBERS, *BAD_NAMES, f"{'a' * 254}:80"])
def test_bad_addresses(bad):
    assert not is_address(bad)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_raise_nothing_else(data):
    with suppress(RecordError):
        verify_record(parse_signed(data))
        pytest.fail("a record out of nothing")


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_altered_bytes_raise_nothing_else(data):
    good = bytearray(GOOD.SerializeToString())
    for _ in range(data.draw(st.integers(1, 3))):
        good[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
    with suppress(RecordError):
        altered = parse_signed(bytes(good))
        verify_record(altered)
        assert altered.record == GOOD.record  # what changed is a field that nobody reads


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_signed_nonsense_raises_nothing_else(data):
    signature = IDENTITY.sign(b"petal peer record 1\0" + data)
    with suppress(RecordError):
        verify_record(pb.SignedRecord(record=data, public_key=IDENTITY.public_key, signature=signature))
        pytest.fail("a record out of nonsense")
