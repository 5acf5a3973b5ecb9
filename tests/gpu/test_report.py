"""What the command for a card makes of pytest's words; it runs here, where there is no card."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from tests.gpu import __main__ as program
from tests.gpu.__main__ import GROUPS, ROOT, counts
from tests.gpu.sanitize import PRODUCTS
from tests.kernels.cuda.layout_cases import CASES


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("....\n53 passed in 49.82s", (53, 0)),
        ("1 failed, 95 passed, 3 skipped in 115.15s (0:01:55)", (95, 1)),
        ("2 errors in 1.2s", (0, 2)),
        ("1 failed, 2 passed, 1 error in 3s\n", (2, 2)),
        ("", (0, 0)),
        ("no tests ran in 0.1s", (0, 0)),
    ],
)
def test_counts(said, found):
    assert counts(said) == {"passed": found[0], "failed": found[1]}


def test_its_files_are_there():
    for files, _ in GROUPS.values():
        assert all((ROOT / file).exists() for file in files)


def test_an_unknown_group_is_refused():
    command = [sys.executable, "-m", "tests.gpu", "nonsense"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no group nonsense" in done.stderr


@pytest.mark.parametrize(
    ("said", "code"), [("5 skipped in 0.10s", 1), ("5 passed in 0.10s", 0), ("4 passed, 1 failed in 0.10s", 1)]
)
def test_where_nothing_passed_all_has_failed(said, code, monkeypatch, capsys):
    monkeypatch.setattr(program, "run", lambda *_: (said, True))
    monkeypatch.setattr(sys, "argv", ["gpu", "span"])
    assert program.main() == code
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["groups"]["span"]["failed"] == code


@pytest.mark.full
def test_a_machine_without_a_card_passes_nothing():
    """Everything is skipped there: that is no success. Its quick twin is above."""
    command = [sys.executable, "-m", "tests.gpu", "span"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    span = json.loads(done.stdout.splitlines()[-1])["groups"]["span"]
    assert torch.cuda.is_available() or (span["passed"], span["failed"], done.returncode) == (0, 1, 1)


def test_every_layout_is_sanitized():
    assert {CASES[name][1] for name in PRODUCTS} == {layout for _, layout in CASES.values()}
