"""What holds for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything loads torch: workers and the peers that they start share the cores, and idle threads of OpenMP spin.
# What depends on the number of threads sets it; `make test-full` runs all with two.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Other programs may keep the machine busy: no example has a deadline. `make test` tries the same examples on any day,
# `make test-full` others every time.
settings.register_profile("same", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.register_profile("other", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("PETAL_EXAMPLES", "same"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits for long begins first: meanwhile the other workers compute."""
    items.sort(key=lambda item: item.get_closest_marker("waits") is None)


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A home of its own: what one test pins or joins is nobody else's."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
