"""A private swarm across network namespaces, by the commands that people type."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ..support.imports import ROOT

ALONE = ["unshare", "--map-root-user", "--net", "--mount"]


def _namespaces() -> bool:
    try:
        return subprocess.run([*ALONE, "ip", "link", "add", "hub", "type", "bridge"], check=False).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.full
@pytest.mark.skipif(not _namespaces(), reason="network namespaces cannot be made here")
def test_two_labs() -> None:
    done = subprocess.run(
        [*ALONE, sys.executable, "-m", "tests.support.two_labs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
