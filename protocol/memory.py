"""How much memory this program can still have: the least of what machine, control groups and its own limits leave."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_UNKNOWN = 1 << 40
# How version 1 of the kernel's control groups says "no limit" differs by page size; nobody has an exabyte.
_NO_LIMIT = 1 << 60


def available_bytes(root: Path = Path("/")) -> int:
    """What this program can have without swapping; file pages that are only cached count, since they make room.

    A terabyte where the system, whose files are at `root`, does not say.
    """
    return max(0, min((_UNKNOWN, *_machine(root), *_groups(root), *_process(root))))


def _machine(root: Path) -> Iterator[int]:
    yield from _kilobytes(root / "proc/meminfo", "MemAvailable")


def _groups(root: Path) -> Iterator[int]:
    """Limits of control groups: a container's, a service's, a job's; every group around ours counts, too."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = ("memory.max", "memory.current", "")
            mount = root / "sys/fs/cgroup"
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            mount = root / "sys/fs/cgroup/memory"
        else:
            continue
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):  # inside a container ours may be mounted as the outermost
            yield from _group(mount / group, *names)


def _group(folder: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    with contextlib.suppress(ValueError):  # "max", or no such file
        most, used = int(_read(folder / limit)), int(_read(folder / usage))
        cached = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
        if most < _NO_LIMIT:
            yield most - used + sum(map(int, cached))


def _process(root: Path) -> Iterator[int]:
    """Limits of this process, as `ulimit -v` and `ulimit -d` set them."""
    if sys.platform == "win32":
        return
    import resource

    status = root / "proc/self/status"
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            yield from (most - nbytes for nbytes in _kilobytes(status, used))


def _kilobytes(file: Path, name: str) -> Iterator[int]:
    if found := re.search(rf"^{name}:\s+(\d+) kB$", _read(file), re.MULTILINE):
        yield int(found[1]) * 1024


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
