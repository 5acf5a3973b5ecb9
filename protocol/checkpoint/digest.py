"""Digests that let two peers prove they host the same weights, and their cache on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..paths import cache_dir
from ..trust.private_file import remove_stale, write_private
from .layout import Layout, TensorInfo

# What peer records carry.
_PART_BYTES = 32
_FORMAT = "petal-digest-1"
# Bookkeeping that changes between exports of the same model.
_IGNORED = {"transformers_version", "use_cache"}


class Parts(Protocol):
    """Of a checkpoint what digests are made of."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...
    @property
    def layout(self) -> Layout: ...
    def raw(self, name: str) -> npt.NDArray[np.uint8]: ...
    def files(self, names: Iterable[str]) -> set[Path]: ...
    def forget(self, view: npt.NDArray[Any]) -> None: ...


def model_digest(config: Mapping[str, Any], names: Iterable[str]) -> str:
    """sha256 in hex over the config's fields and the sorted tensor names."""
    fields = {key: value for key, value in config.items() if not key.startswith("_") and key not in _IGNORED}
    text = json.dumps([fields, sorted(names)], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def short(digest: str) -> str:
    """The first 16 characters: enough to tell models apart in names and logs."""
    return digest[:16]


def part_digest(checkpoint: Parts, names: Iterable[str]) -> str:
    """blake2b-32 in hex over name, type, shape and stored bytes of `names` in sorted order."""
    digest = hashlib.blake2b(digest_size=_PART_BYTES)
    for name in sorted(names):
        info = checkpoint.tensors[name]
        digest.update(json.dumps([name, info.dtype, info.shape], separators=(",", ":")).encode() + b"\n")
        stored = checkpoint.raw(name)
        digest.update(stored.data)
        checkpoint.forget(stored)
    return digest.hexdigest()


class DigestCache:
    """Part digests on disk, keyed by the path, size and time of the files that store the part.

    A cache that cannot be read or written costs time, never correctness.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or cache_dir() / "digests"

    def get(self, checkpoint: Parts, part: str) -> str:
        """Digest of one part of `checkpoint`: from disk if its files are unchanged, else computed and kept."""
        names = checkpoint.layout.part(part)
        path = self.folder / f"{_key(checkpoint.files(names))}.json"
        digest = self._load(path).get(part)
        if digest is None:
            digest = part_digest(checkpoint, names)
            self._store(path, {**self._load(path), part: digest})
        return digest

    def _load(self, path: Path) -> dict[str, str]:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        entries = found.items() if isinstance(found, dict) else ()
        return {part: digest for part, digest in entries if isinstance(digest, str) and len(digest) == 2 * _PART_BYTES}

    def _store(self, path: Path, entries: dict[str, str]) -> None:
        try:
            write_private(path, json.dumps(entries).encode())
            remove_stale(self.folder, "*.tmp")
        except OSError:
            return


def _key(files: Iterable[Path]) -> str:
    stats = [(str(path.resolve()), path.stat()) for path in sorted(files)]
    text = json.dumps([_FORMAT, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
