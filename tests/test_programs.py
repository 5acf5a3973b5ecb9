"""Programs under tests/ that no test runs still import what there is."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
PROGRAMS = sorted(
    ".".join(path.relative_to(FOLDER.parent).with_suffix("").parts)
    for folder in ("attack", "bench", "chaos", "support")
    for path in (FOLDER / folder).rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_can_be_imported(program: str):
    importlib.import_module(program)


def test_there_are_some():
    assert {"tests.bench.swarm", "tests.chaos.__main__", "tests.attack.__main__"} <= set(PROGRAMS)
