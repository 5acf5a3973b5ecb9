"""Files of hub models on this machine: one folder a commit, a limit in bytes, the least recently used go first."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from ..paths import cache_dir
from .layout import CheckpointError

# Left free on the disk whatever the limit.
_MARGIN = 1 << 28
_ABSENT, _PARTIAL = ".absent", ".partial"


class HubCache:
    """`folder`/org--name/COMMIT/file, and `folder`/org--name/refs/REVISION, which names a commit.

    `limit` is in bytes; without one, what is free on the disk is the limit.
    """

    def __init__(self, folder: Path, limit: int | None = None) -> None:
        self.folder, self.limit = folder, limit

    @classmethod
    def of_user(cls) -> HubCache:
        """The cache of this user; `PETAL_CACHE_GB` in the environment limits it. Raises CheckpointError."""
        text = os.environ.get("PETAL_CACHE_GB")
        try:
            limit = None if text is None else int(float(text) * 1e9)
        except ValueError as error:
            raise CheckpointError(f"PETAL_CACHE_GB is {text!r}: give a number of gigabytes, such as 40.") from error
        return cls(cache_dir() / "hub", limit)

    def find(self, model: str, commit: str, file: str) -> Path | None:
        """The file if it is here, which counts as a use."""
        path = self.place(model, commit, file)
        try:
            stat = path.stat()
            # The time of writing stays: digests are kept by it.
            os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
        except OSError:
            return None
        return path

    def place(self, model: str, commit: str, file: str) -> Path:
        """Where a file of a model belongs."""
        return self._model(model) / commit / file

    def is_absent(self, model: str, commit: str, file: str) -> bool:
        """Whether the model is known not to have the file."""
        return self.place(model, commit, file + _ABSENT).exists()

    def note_absent(self, model: str, commit: str, file: str) -> None:
        """Remember that the model has no such file."""
        self._write(self.place(model, commit, file + _ABSENT), "")

    def commit_of(self, model: str, revision: str) -> str | None:
        """The commit that a branch or tag was when it was last asked for."""
        try:
            return (self._model(model) / "refs" / revision).read_text()
        except OSError:
            return None

    def note_commit(self, model: str, revision: str, commit: str) -> None:
        """Remember what a branch or tag is now."""
        self._write(self._model(model) / "refs" / revision, commit)

    def make_room(self, target: Path, size: int) -> Path:
        """Evict files until `size` bytes fit beside the others; returns the path to write them to, next to `target`.

        What a broken download left there stays. Files of the same commit are not evicted: they are in use. Raises
        CheckpointError if there is no room.
        """
        partial = target.with_name(target.name + _PARTIAL)
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists() and partial.stat().st_size > size:
            partial.unlink()
        files = sorted((path for path in self._files() if path != partial), key=lambda path: path.stat().st_atime_ns)
        evictable = [path for path in files if path.parent != target.parent]
        excess = self._excess(sum(path.stat().st_size for path in files), size, partial)
        for path in evictable:
            if excess <= 0:
                break
            excess -= path.stat().st_size
            path.unlink()
        if excess > 0:
            raise CheckpointError(
                f"{target.name} needs {excess / 1e9:.1f} GB more than {self.folder} may hold: make room on that disk, "
                "or raise PETAL_CACHE_GB."
            )
        return partial

    def _excess(self, used: int, size: int, partial: Path) -> int:
        """Bytes that are too many if `size` come on top of `used`."""
        written = partial.stat().st_size if partial.exists() else 0
        excess = size - written + _MARGIN - shutil.disk_usage(partial.parent).free
        return excess if self.limit is None else max(excess, used + size - self.limit)

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*/*/*") if path.is_file() and path.parent.name != "refs"]

    def _model(self, model: str) -> Path:
        return self.folder / model.replace("/", "--")

    def _write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
