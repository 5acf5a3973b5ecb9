"""The attacks themselves: a few of each, and proof that they would notice an open door."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from ..attack.forgeries import forge
from ..attack.fuzz import Fuzz
from ..attack.tally import Tally
from ..support.imports import ROOT


def few() -> Tally:
    return Tally(rounds=20, random=random.Random(7))


def test_forgeries_are_refused(tmp_path: Path) -> None:
    tally = few()
    forge(tally, tmp_path)
    assert sum(tally.tried.values()) > 100
    assert {attack for attack, accepted in tally.accepted.items() if accepted} == set()


@pytest.mark.parametrize(
    ("check", "attack"),
    [
        ("petal.protocol.directory.records.verify", "forged record"),
        ("petal.protocol.trust.trust.verify_leaf", "hello of another session"),
        ("petal.protocol.private.authority.verify", "request in another's name"),
        ("petal.protocol.checkpoint.safetensors_model._is_shard_name", "path as a shard"),
    ],
)
def test_an_open_door_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check: str, attack: str
) -> None:
    tally = few()
    monkeypatch.setattr(check, lambda *_: True)
    forge(tally, tmp_path)
    assert tally.accepted[attack] > 0


def test_malformed_bytes_crash_no_parser(tmp_path: Path) -> None:
    fuzz = Fuzz(few(), 2000, 60)
    fuzz.parsers(tmp_path, 1.0)
    assert sum(fuzz.inputs.values()) >= 1990
    assert fuzz.crashes == []


@pytest.mark.full
def test_a_tenth_of_everything() -> None:
    command = [sys.executable, "-m", "tests.attack", "--json", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["sessions_dropped"] == 1000
