"""Good records, which tests then break."""

import time
from functools import cache

from petal.protocol import petal_pb2 as pb
from petal.protocol.directory.records import sign_record
from petal.protocol.trust.identity import Identity
from petal.protocol.trust.trust import PublicTrust


@cache
def trust_of(identity: Identity) -> PublicTrust:
    return PublicTrust(identity)


def good_record(identity: Identity, model: str = "tiny", **changes) -> pb.PeerRecord:
    record = pb.PeerRecord(
        peer_id=identity.peer_id,
        model=model,
        model_digest=b"m" * 32,
        n_blocks=8,
        start=2,
        end=4,
        addresses=["127.0.0.1:31330", "[::1]:31330", "peer.example.org:80"],
        dtype="bfloat16",
        state=pb.ONLINE,
        block_digests=[b"b" * 32] * 2,
        throughput=10.0,
        version=1,
        expires_at=time.time() + 30,
        certificates=trust_of(identity).certificates,
        hello_nonce=trust_of(identity).nonce,
    )
    for field, value in changes.items():
        if isinstance(value, list):
            del getattr(record, field)[:]
            getattr(record, field).extend(value)
        else:
            setattr(record, field, value)
    return record


def signed_record(identity: Identity, model: str = "tiny", **changes) -> pb.SignedRecord:
    return sign_record(identity, good_record(identity, model, **changes))
