"""Forged, expired, replayed and foreign records, certificates, invitations and lists, against what checks them."""

from __future__ import annotations

import datetime
import time
from pathlib import Path

import jwt
from cryptography import x509
from petal.protocol import petal_pb2 as pb
from petal.protocol.directory.directory import RecordBook
from petal.protocol.directory.records import RecordError, parse_signed, sign_record, tombstone, verify_record
from petal.protocol.private.authority import Authority
from petal.protocol.private.certificates import der_of, issue_admin, issue_member, make_root, verify_chain
from petal.protocol.private.invites import InviteError
from petal.protocol.private.membership import request_for
from petal.protocol.private.revocations import sign_list
from petal.protocol.trust.identity import Identity
from petal.protocol.trust.tls_key import TlsKey, name_of
from petal.protocol.trust.trust import PublicTrust, TrustError

from tests.protocol.records_for_tests import good_record, signed_record

from .paths import trick_paths
from .tally import Tally

NOW = datetime.datetime.now(datetime.timezone.utc)


def forge(tally: Tally, folder: Path) -> None:
    """Everything here is offline: no socket, only the checks."""
    ours = Authority.init("ours", "127.0.0.1:4000", folder / "ours")
    theirs = Authority.init("theirs", "127.0.0.1:5000", folder / "theirs")
    _records(tally)
    _private_records(tally, ours, theirs)
    _hellos(tally)
    _chains(tally, ours)
    _invitations(tally, ours, theirs)
    _requests(tally, ours)
    _lists(tally, ours, theirs)
    trick_paths(tally, folder, ours)


def _records(tally: Tally) -> None:
    alice, eve = Identity.ephemeral(), Identity.ephemeral()
    good = signed_record(alice)
    for _ in range(tally.rounds):
        forged = pb.SignedRecord(
            record=tally.damaged(good.record), public_key=good.public_key, signature=good.signature
        )
        tally.refused("forged record", lambda forged=forged: verify_record(forged), RecordError)
        wire = tally.damaged(good.SerializeToString())
        if pb.SignedRecord.SerializeToString(_parsed(wire)) != good.SerializeToString():
            tally.refused("damaged record", lambda wire=wire: verify_record(parse_signed(wire)), RecordError)
        stolen = pb.SignedRecord(record=good.record, public_key=eve.public_key, signature=eve.sign(good.record))
        tally.refused("record signed by another", lambda stolen=stolen: verify_record(stolen), RecordError)
    for age in (4, 60, 3600):
        expired = signed_record(alice, expires_at=time.time() - age)
        tally.refused("expired record", lambda expired=expired: verify_record(expired), RecordError)
        eternal = signed_record(alice, expires_at=time.time() + 600 + age)
        tally.refused("record that lives too long", lambda eternal=eternal: verify_record(eternal), RecordError)
    book, new = RecordBook(), good_record(alice, version=9)
    for version in range(1, 9):
        book.add(sign_record(alice, new))
        tally.count("replayed record", book.add(signed_record(alice, version=version)))
    book.add(sign_record(alice, tombstone(new)))
    tally.count("record of a peer that has left", book.add(sign_record(alice, new)))
    borrowed = good_record(alice, certificates=PublicTrust(eve).certificates)
    tally.refused("record with another's TLS key", lambda: verify_record(sign_record(alice, borrowed)), RecordError)


def _parsed(wire: bytes) -> pb.SignedRecord:
    try:
        return pb.SignedRecord.FromString(wire)
    except Exception:  # whatever protobuf raises: it is no record
        return pb.SignedRecord()


def _private_records(tally: Tally, ours: Authority, theirs: Authority) -> None:
    book, eve = RecordBook(ours.membership), Identity.ephemeral()
    tally.refused("record of a public swarm", lambda: book.add(signed_record(eve)), RecordError)
    chain = theirs.redeem(theirs.invite("peer", {}, 1, 60), request_for(TlsKey.ephemeral(), eve))
    foreign = signed_record(eve, certificates=chain)
    tally.refused("record of a foreign swarm", lambda: book.add(foreign), RecordError)
    mixed = signed_record(eve, certificates=[chain[0], ours.membership.certificates[1]])
    tally.refused("record with our admin's certificate added", lambda: book.add(mixed), RecordError)
    chain = ours.redeem(ours.invite("client", {}, 1, 60), request_for(TlsKey.ephemeral(), eve))
    client = signed_record(eve, certificates=chain)
    tally.refused("record of a member that is no peer", lambda: book.add(client), RecordError)


def _hellos(tally: Tally) -> None:
    server, client = PublicTrust(Identity.ephemeral()), PublicTrust()
    record = pb.PeerRecord(certificates=server.certificates, hello_nonce=server.nonce)
    hello = client.hello(record, b"s" * 16)
    assert server.principal({}, hello, b"s" * 16).name
    for _ in range(tally.rounds):
        forged = pb.Hello(public_key=hello.public_key, signature=tally.damaged(hello.signature))
        tally.refused("forged hello", lambda forged=forged: server.principal({}, forged, b"s" * 16), TrustError)
        other = tally.random.randbytes(16)
        tally.refused("hello of another session", lambda other=other: server.principal({}, hello, other), TrustError)


def _chains(tally: Tally, ours: Authority) -> None:
    root, key, admin = ours.root, ours.key, ours.certificate
    leaf, eve = TlsKey.ephemeral(), TlsKey.ephemeral()
    name = name_of(leaf.public_key)
    good = [der_of(issue_member(key, admin, leaf.key.public_key(), name, "peer", {})), der_of(admin)]
    assert verify_chain(root, good, NOW).name == name
    for _ in range(tally.rounds):
        place = tally.random.randrange(2)
        forged = [tally.damaged(der) if i == place else der for i, der in enumerate(good)]
        tally.refused("forged certificate", lambda forged=forged: verify_chain(root, forged, NOW), TrustError)
    fake_root = make_root(eve, "ours")
    fake_admin = issue_admin(eve, fake_root, eve.key.public_key(), "admin")
    fake = issue_member(eve, fake_admin, leaf.key.public_key(), name, "peer", {})
    wrong = [[der_of(fake), der_of(fake_admin)], [der_of(fake), der_of(admin)], [der_of(fake), der_of(root)]]
    for chain in wrong:
        tally.refused("certificate of a wrong root", lambda chain=chain: verify_chain(root, chain, NOW), TrustError)
    below = issue_admin(key, admin, eve.key.public_key(), "below")
    member = issue_member(eve, below, leaf.key.public_key(), name, "peer", {})
    by_member = issue_member(leaf, x509.load_der_x509_certificate(good[0]), eve.key.public_key(), name, "peer", {})
    for chain in ([der_of(member), der_of(below)], [der_of(by_member), good[0]], [good[1], good[1]], good[:1], []):
        tally.refused("certificate of no admin", lambda chain=chain: verify_chain(root, chain, NOW), TrustError)
    for days in (8, 400):
        later = NOW + datetime.timedelta(days=days)
        tally.refused("expired certificate", lambda later=later: verify_chain(root, good, later), TrustError)


def _invitations(tally: Tally, ours: Authority, theirs: Authority) -> None:
    request = request_for(TlsKey.ephemeral(), None)
    good = ours.invite("client", {}, 1, 600)
    header, claims, signature = good.split(".")
    for _ in range(tally.rounds):
        forged = list(good)
        place = tally.random.randrange(len(header) + 1, len(good) - 2)
        forged[place] = "A" if forged[place] != "A" else "B"
        tally.refused("forged invitation", lambda forged=forged: ours.redeem("".join(forged), request), InviteError)
    payload = jwt.decode(good, options={"verify_signature": False})
    unsigned = jwt.encode(payload, None, "none")
    confused = jwt.encode(payload, name_of(ours.key.public_key) * 2, "HS256")
    others = jwt.encode(payload, theirs.key.key, "ES256")
    foreign = theirs.invite("client", {}, 1, 600)
    for token in (unsigned, confused, others, foreign, f"{header}.{claims}.", f"..{signature}", "x" * 9000):
        tally.refused("invitation of another", lambda token=token: ours.redeem(token, request), InviteError)
    late = jwt.encode({**payload, "exp": int(time.time()) - 5}, ours.key.key, "ES256")
    tally.refused("expired invitation", lambda: ours.redeem(late, request), InviteError)
    assert ours.redeem(good, request)
    for _ in range(20):
        other = request_for(TlsKey.ephemeral(), None)
        tally.refused("stolen invitation after its uses", lambda other=other: ours.redeem(good, other), InviteError)


def _requests(tally: Tally, ours: Authority) -> None:
    alice, eve = Identity.ephemeral(), Identity.ephemeral()
    token = ours.invite("peer", {}, 10_000, 600)
    good = request_for(TlsKey.ephemeral(), alice)
    borrowed = pb.CertificateRequest(
        csr=good.csr, identity=alice.public_key, identity_signature=eve.sign(b"petal member identity 1\0" + good.csr)
    )
    tally.refused("request in another's name", lambda: ours.redeem(token, borrowed), TrustError)
    for _ in range(tally.rounds):
        forged = pb.CertificateRequest(
            csr=tally.damaged(good.csr), identity=good.identity, identity_signature=good.identity_signature
        )
        tally.refused("forged request", lambda forged=forged: ours.redeem(token, forged), TrustError)


def _lists(tally: Tally, ours: Authority, theirs: Authority) -> None:
    lists, key, admin = ours.membership.lists, ours.key, ours.certificate
    lists.add(sign_list(key, admin, 5, [1, 2, 3]))
    for number in range(1, 6):
        tally.count("revocation list of a lower number", lists.add(sign_list(key, admin, number, [])))
    member, leaf = TlsKey.ephemeral(), TlsKey.ephemeral()
    owned = issue_member(key, admin, member.key.public_key(), name_of(member.public_key), "peer", {})
    for forged in (
        sign_list(member, owned, 9, []),
        sign_list(leaf, admin, 9, []),
        sign_list(theirs.key, theirs.certificate, 9, []),
        sign_list(theirs.root_key, theirs.root, 9, []),
    ):
        tally.refused("revocation list of nobody who may", lambda forged=forged: lists.add(forged), TrustError)
    good = sign_list(key, admin, 6, [1])
    for _ in range(tally.rounds):
        forged = pb.RevocationList(crl=tally.damaged(good.crl), issuer=good.issuer)
        tally.refused("forged revocation list", lambda forged=forged: lists.add(forged), TrustError)
    name = name_of(member.public_key)
    admins = verify_chain(ours.root, [der_of(owned), der_of(admin)], NOW)
    lists.add(sign_list(key, admin, 7, [admin.serial_number]))
    tally.count("an admin that revokes an admin", lists.revoked(admins))
    assert admins.name == name
