"""An admin's folder and its members without a network: what is kept, what runs out, what the commands print."""

from __future__ import annotations

import dataclasses
import datetime
import json
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from petal.protocol import petal_pb2 as pb
from petal.protocol.paths import data_dir
from petal.protocol.private import membership as members
from petal.protocol.private.authority import Authority
from petal.protocol.private.certificates import MEMBER_LIFETIME, der_of, issue_admin, issue_member
from petal.protocol.private.invites import InviteError, read_token
from petal.protocol.private.membership import Membership, request_for
from petal.protocol.private.revocations import sign_list
from petal.protocol.trust.identity import Identity
from petal.protocol.trust.tls_key import TlsKey
from petal.protocol.trust.trust import TrustError

from ..support import commands

DAY = datetime.timedelta(days=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.init("lab", "127.0.0.1:4000", tmp_path / "lab")


def member_of(authority: Authority, folder: Path) -> Membership:
    """A client that has joined."""
    key = TlsKey.ephemeral()
    chain = authority.redeem(authority.invite("client", {}, 1, 60), request_for(key, None))
    root, lists = der_of(authority.root), authority.membership.revocations
    return Membership.store(folder, key, pb.Issued(certificates=chain, root=root, revocations=lists))


def petal(*words: str) -> str:
    """What a command prints."""
    done = commands.petal(*words)
    assert done.code == 0, done.output
    return done.output


def test_certificates_live_for_a_week_and_are_renewed_from_half_of_it_on(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member, now = member_of(authority, tmp_path / "member"), datetime.datetime.now(datetime.timezone.utc)
    assert 7 * DAY == MEMBER_LIFETIME
    for days, due, valid in ((0, False, True), (3.4, False, True), (3.6, True, True), (7.1, True, False)):
        monkeypatch.setattr(members, "_now", lambda days=days: now + days * DAY)
        assert (member.due, member.valid) == (due, valid), days


def test_uses_are_counted_on_disk_and_by_key(authority: Authority) -> None:
    token, request = authority.invite("client", {}, 2, 60), request_for(TlsKey.ephemeral(), None)
    for _ in range(3):
        assert Authority(authority.folder).redeem(token, request), "the same key may come again"
    assert Authority(authority.folder).redeem(token, request_for(TlsKey.ephemeral(), None))
    with pytest.raises(InviteError, match="used up"):
        Authority(authority.folder).redeem(token, request_for(TlsKey.ephemeral(), None))
    assert Authority(authority.folder).redeem(token, request)


def test_who_was_put_out_stays_out(authority: Authority) -> None:
    identity = Identity.ephemeral()
    first = request_for(TlsKey.ephemeral(), identity)
    authority.redeem(authority.invite("peer", {}, 1, 60), first)
    name = authority.ledger.issues()[-1].name
    authority.revoke(name)
    again = request_for(TlsKey.ephemeral(), identity)
    with pytest.raises(InviteError, match="this key was revoked"):
        authority.redeem(authority.invite("peer", {}, 1, 60), again)
    with pytest.raises(TrustError, match="while it is not revoked"):
        authority.renew(again, name, "peer", {})


def test_lists_are_kept_and_only_rise(authority: Authority, tmp_path: Path) -> None:
    member, other = member_of(authority, tmp_path / "one"), member_of(authority, tmp_path / "other")
    old = sign_list(authority.key, authority.certificate, 1, [])
    other.learn([old])
    assert other.trusted(member.certificates)
    authority.revoke(member.name)
    authority.revoke(member_of(authority, tmp_path / "third").name)
    other.learn(authority.membership.revocations)
    again = Membership(tmp_path / "other")
    for listener in (other, again):
        listener.learn([old])
        assert not listener.trusted(member.certificates)
        assert listener.trusted(other.certificates)


def test_with_an_admin_goes_whoever_it_let_in_whenever_it_says_that_was(authority: Authority, tmp_path: Path) -> None:
    guest, thief = member_of(authority, tmp_path / "guest"), TlsKey.ephemeral()
    second = issue_admin(authority.root_key, authority.root, thief.key.public_key(), "second")
    authority.ledger.record_admin("second", second.serial_number, second.not_valid_after_utc.timestamp())
    leaf = issue_member(thief, second, TlsKey.ephemeral().key.public_key(), "friend", "peer", {})
    backdated = [der_of(leaf), der_of(second)]
    guest.learn(authority.membership.revocations)
    assert guest.trusted(backdated)
    authority.revoke("second")
    guest.learn(authority.membership.revocations)
    assert not guest.trusted(backdated)
    assert guest.valid, "the other admin's members stay"


def test_grpc_is_told_only_of_what_is_new(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told at every handshake, it crashes sooner or later."""
    fetchers: list[Callable[[], object]] = []
    monkeypatch.setattr("grpc.dynamic_ssl_server_credentials", lambda _, fetch, **__: fetchers.append(fetch))
    member = authority.membership
    member.server_credentials()
    [fetch] = fetchers
    assert fetch() is None
    authority.join_own_swarm()
    member.reload()
    assert fetch() is not None
    assert fetch() is None


def test_who_was_revoked_in_a_ledger_of_the_first_version_stays_so(authority: Authority) -> None:
    with closing(sqlite3.connect(authority.folder / "ledger.sqlite", isolation_level=None)) as database:
        database.execute("DROP TABLE revoked")
        database.execute("CREATE TABLE barred (name TEXT PRIMARY KEY)")
        database.execute("INSERT INTO barred VALUES ('eve')")
    ledger = Authority(authority.folder).ledger
    assert (ledger.revoked("eve"), ledger.revoked("alice")) == (True, False)
    ledger.revoke("mallory")
    again = Authority(authority.folder).ledger
    assert again.revoked("eve")
    assert again.revoked("mallory")


def test_the_commands(tmp_path: Path) -> None:
    home = tmp_path / "home" / "petal" / "swarms" / "oxford"
    assert str(home / "root.key") in petal("swarm", "init", "oxford", "--address", "127.0.0.1:4000").replace("\n", "")
    words = ["--role", "client", "--uses", "2", "--expires", "12h", "--label", "lab=oxford"]
    [line] = petal("swarm", "invite", *words).splitlines()
    token, invite = read_token(line)
    assert (invite.role, invite.uses, invite.labels, invite.addresses) == (
        "client",
        2,
        {"lab": "oxford"},
        ("127.0.0.1:4000",),
    )
    authority = Authority(home)
    authority.redeem(token, request_for(TlsKey.ephemeral(), None))
    [member] = json.loads(petal("swarm", "members", "--json"))
    assert (member["role"], member["labels"], member["revoked"]) == ("client", {"lab": "oxford"}, False)
    assert "Revoked client" in petal("swarm", "revoke", member["name"][:8])
    assert json.loads(petal("swarm", "members", "--json"))[0]["revoked"]
    before = authority.key.public_key
    petal("swarm", "rotate")
    assert authority.key.public_key != before
    (home / "root.key").rename(tmp_path / "offline")
    assert "needs the root key" in commands.petal("swarm", "rotate").line("petal")


def test_an_invitation_is_read_from_a_file_and_from_the_environment(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = authority.invite("client", {}, 1, 60)
    (tmp_path / "invitation").write_text(token + "\n")
    assert read_token(str(tmp_path / "invitation"))[0] == token
    monkeypatch.setenv("PETAL_JOIN", str(tmp_path / "nothing"))
    assert "neither a token nor a file that holds one" in commands.petal("swarm", "status").line("petal")


def test_swarms_are_listed_and_left(authority: Authority) -> None:
    folder = data_dir() / "members" / "elsewhere"
    member_of(authority, folder)
    [held] = json.loads(petal("swarm", "list", "--json"))
    assert (held["swarm"], held["role"], held["folder"]) == ("lab", "client", str(folder))
    assert held["id"] in authority.ledger.issues()[-1].name
    assert "Left lab: 1 memberships are gone" in petal("swarm", "leave", "lab")
    assert not folder.exists()
    assert "None yet" in petal("swarm", "list")
    Authority.init("mine", "127.0.0.1:4000")
    assert "its keys are in" in commands.petal("swarm", "leave", "mine").line("petal")


def test_an_admin_may_move_and_members_find_it_by_a_new_invitation(authority: Authority, tmp_path: Path) -> None:
    member = member_of(authority, tmp_path / "member")
    authority.move_to("192.0.2.9:31500")
    assert Authority(authority.folder).address == "192.0.2.9:31500"
    _, invite = read_token(authority.invite("client", {}, 1, 60))
    member.find_admin(invite)
    assert Membership(tmp_path / "member").admin == "192.0.2.9:31501"
    member.find_admin(dataclasses.replace(invite, admin="somebody", addresses=("192.0.2.66:1",)))
    assert member.admin == "192.0.2.9:31501", "another admin's invitation moves nobody"


def test_a_second_admin_of_a_swarm_is_told_that_there_is_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        mine = Authority.init("mine", f"127.0.0.1:{taken.getsockname()[1]}")
        line = commands.petal("swarm", "admin", "mine", "--host", "127.0.0.1").line("petal")
    assert "the port is in use; where this admin runs already, leave it be" in line
    assert (mine.folder / "ledger.sqlite").stat().st_mode & 0o777 == 0o600
