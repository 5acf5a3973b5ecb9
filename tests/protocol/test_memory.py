"""Memory that only caches files is there to be had; a container's, a job's and a process's limits are kept."""

from __future__ import annotations

import mmap
import resource
from pathlib import Path

import psutil
import pytest
from petal.protocol import memory

MIB = 1 << 20
MEMINFO = "MemTotal: 1000000 kB\nMemFree: 10 kB\nMemAvailable:     819200 kB\nCached: 790 kB\n"


def tree(root: Path, **files: str) -> Path:
    """A system whose machine has 800 MiB left, with these files more."""
    for path, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def test_available_is_at_most_what_the_system_says() -> None:
    assert memory.available_bytes() <= psutil.virtual_memory().available * 1.1


def test_cached_files_take_nothing_away(tmp_path: Path) -> None:
    assert memory.available_bytes(tree(tmp_path)) == 800 * MIB


def test_memory_in_use_is_not_there() -> None:
    """The negative control; once in a few tries no other program gives as much back meanwhile."""

    def seen_in_use(size: int) -> bool:
        before = memory.available_bytes()
        with mmap.mmap(-1, size) as block:
            for page in range(0, size, mmap.PAGESIZE):
                block[page] = 1
            return memory.available_bytes() < before - size // 2

    assert any(seen_in_use(1 << 29) for _ in range(20))


def test_a_system_that_says_nothing_does_not_limit(tmp_path: Path) -> None:
    assert memory.available_bytes(tmp_path) >= 1 << 40


def v2(group: str, limit: str, used: int, cached: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup{group}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cached // 2}\nactive_file {cached // 2}\n",
    }


def v1(group: str, limit: int, used: int, cached: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup/memory{group}"
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0\n",
    }


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", v2("", str(300 * MIB), 200 * MIB, 50 * MIB), 150),
        ("0::/", v2("", "max", 200 * MIB, 50 * MIB), 800),
        ("0::/", v2("", str(900 * MIB), 10 * MIB, 0), 800),
        ("0::/jobs/a", v2("/jobs", str(300 * MIB), 290 * MIB, 0) | v2("/jobs/a", "max", MIB, 0), 10),
        ("0::/jobs/a", v2("/jobs/a", str(300 * MIB), 310 * MIB, 0), 0),
        ("3:cpu:/\n2:memory:/docker/x\n0::/docker/x", v1("", 300 * MIB, 200 * MIB, 50 * MIB), 150),
        ("2:cpu,memory:/x", v1("/x", 40 * MIB, 20 * MIB, 0), 20),
        ("2:memory:/", v1("", 0x7FFFFFFFFFFFF000, 20 * MIB, 0), 800),
        ("3:cpu:/", v1("", 40 * MIB, 20 * MIB, 0), 800),
    ],
    ids=[
        "v2",
        "v2, no limit",
        "v2, more than there is",
        "a group around ours",
        "over",
        "v1",
        "v1 below",
        "v1, none",
        "cpu",
    ],
)
def test_control_groups(tmp_path: Path, groups: str, files: dict[str, str], expected: int) -> None:
    root = tree(tmp_path, **{"proc/self/cgroup": groups + "\n"}, **files)
    assert memory.available_bytes(root) == expected * MIB


@pytest.mark.parametrize("kind", [resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_limits_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    limits = {kind: (500 * MIB, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits.get(which, (resource.RLIM_INFINITY,) * 2))
    status = {"proc/self/status": f"VmSize:\t  {100 << 10} kB\nVmData:\t {100 << 10} kB\n"}
    assert memory.available_bytes(tree(tmp_path, **status)) == 400 * MIB
