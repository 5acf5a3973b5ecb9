import os
import stat

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from hivemind.p2p import P2P, PeerID
from petal.protocol.trust.identity import Identity, peer_id_of, verify


@pytest.fixture(scope="module")
def identity():
    return Identity.ephemeral()


def public_der(key):
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def test_is_made_once_and_kept_private(tmp_path):
    path = tmp_path / "new folder" / "identity"
    made = Identity.load_or_create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["identity"]
    assert Identity.load_or_create(path).public_key == made.public_key


def test_reads_the_daemons_own_files(tmp_path):
    path = str(tmp_path / "identity")
    P2P.generate_identity(path)
    assert (
        Identity.load_or_create(path).peer_id == PeerID.from_identity((tmp_path / "identity").read_bytes()).to_base58()
    )


async def test_is_the_daemons_peer_id(tmp_path):
    path = str(tmp_path / "identity")
    identity = Identity.load_or_create(path)
    daemon = await P2P.create(identity_path=path)
    try:
        assert daemon.peer_id.to_base58() == identity.peer_id == peer_id_of(identity.public_key)
    finally:
        await daemon.shutdown()


@pytest.mark.parametrize("damage", [b"", b"not a key", "truncated", "longer", "another kind"])
def test_a_damaged_file_says_what_to_do(tmp_path, damage):
    path = tmp_path / "identity"
    Identity.load_or_create(path)
    good = path.read_bytes()
    kinds = {"truncated": good[:-1], "longer": good + b"\0", "another kind": b"\x08\x01" + good[2:]}
    path.write_bytes(kinds.get(damage, damage))
    with pytest.raises(ValueError, match=r"delete it to get a new identity.*\.$"):
        Identity.load_or_create(path)
    assert os.path.exists(path)


def test_signatures(identity):
    signature = identity.sign(b"words")
    assert verify(identity.public_key, signature, b"words")
    assert not verify(identity.public_key, signature, b"other words")
    assert not verify(identity.public_key, signature[:-1], b"words")
    assert not verify(Identity.ephemeral().public_key, signature, b"words")


def test_hostile_keys_are_refused():
    pss = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)
    short = rsa.generate_private_key(65537, 1024)
    odd = rsa.generate_private_key(3, 2048)
    for key in short, odd:
        assert not verify(public_der(key), key.sign(b"words", pss, hashes.SHA256()), b"words")
    curve = ec.generate_private_key(ec.SECP256R1())
    assert not verify(public_der(curve), curve.sign(b"words", ec.ECDSA(hashes.SHA256())), b"words")
    for junk in b"", b"junk", b"\x30" * 4000:
        assert not verify(junk, b"", b"words")
