"""Two peers of one machine are two peers: an identity is one process's at a time, and remembers its ports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from petal.peer.identity import Claim, IdentityInUse


def test_the_second_peer_takes_the_next_identity(tmp_path: Path) -> None:
    first, second = Claim.named(None), Claim.named(None)
    assert first.path.name == "identity"
    assert second.path.name == "identity-2"
    assert first.identity.peer_id != second.identity.peer_id
    second.release()
    third = Claim.named(None)
    assert third.path == second.path
    assert third.identity.peer_id == second.identity.peer_id


def test_a_named_identity_in_use_is_refused(tmp_path: Path) -> None:
    claim = Claim.named(tmp_path / "mine")
    with pytest.raises(IdentityInUse, match=r"runs as .*mine; leave --identity out, or name"):
        Claim.named(tmp_path / "mine")
    claim.release()
    Claim.named(tmp_path / "mine").release()


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    hold = (
        "import sys; from petal.peer.identity import Claim; from pathlib import Path;"
        "c = Claim(Path(sys.argv[1])); print(c.identity.peer_id, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "mine")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        name = other.stdout.readline().strip()
        with pytest.raises(IdentityInUse):
            Claim(tmp_path / "mine")
        other.kill()
        other.wait()
        assert Claim(tmp_path / "mine").identity.peer_id == name


def test_ports_are_remembered_by_identity(tmp_path: Path) -> None:
    claim = Claim(tmp_path / "mine")
    assert claim.port("grpc") == 0
    claim.remember_port("grpc", 45123)
    claim.remember_port("dht", 45124)
    claim.release()
    again = Claim(tmp_path / "mine")
    assert (again.port("grpc"), again.port("dht")) == (45123, 45124)
    assert Claim(tmp_path / "another").port("grpc") == 0


@pytest.mark.parametrize("text", ["", "[]", '{"grpc": 99999}', '{"grpc": "x"}', "\0"])
def test_a_damaged_file_of_ports_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.ports").write_text(text)
    assert Claim(tmp_path / "mine").port("grpc") == 0


def test_without_a_home_the_identity_is_of_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "file"))
    claim = Claim.named(None)
    assert "--identity" in caplog.text
    place = claim.path.parent
    assert os.listdir(place)
    claim.release()
    assert not place.exists()
