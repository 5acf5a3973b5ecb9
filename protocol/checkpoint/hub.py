"""Models on the Hugging Face hub: only the files asked for are fetched, and never code or pickle.

huggingface_hub finds, links and deletes what is cached. Two things are ours because it lacks them: a download that
broke off goes on where it stopped (`HubFolder._complete`; recent versions of the library delete what is there of it
and begin anew), and the cache has a limit (`HubCache.make_room`).
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from ..paths import cache_dir
from .layout import CheckpointError, TensorInfo

_ALLOWED = {".safetensors", ".json", ".jinja", ".txt"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
# It names a file in the cache.
_ETAG = re.compile(r"[\w-]+")
# A hub that is there answers sooner.
_ANSWER_S = 5.0
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}
# Left free on the disk whatever the limit.
_MARGIN = 1 << 28
_PARTIAL = ".incomplete"
# Who still downloads writes more often.
_BROKEN_S = 60.0


class HubCache:
    """What was fetched, in huggingface_hub's layout; its own folder, for the limit is not for other programs' files.

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
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"PETAL_CACHE_GB is {text!r}: give a number of gigabytes, such as 40.") from error
        return cls(cache_dir() / "hub", limit)

    def find(self, model: str, file: str, revision: str) -> Path | Literal["absent"] | None:
        """The file, here or in huggingface_hub's own cache, which counts as a use.

        "absent" if the model is known not to have it. A branch or tag is the commit that it was when last asked for.
        """
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

        for folder in (self.folder, None):
            found = try_to_load_from_cache(model, file, cache_dir=folder, revision=revision)
            if found is _CACHED_NO_EXIST:
                return "absent"
            if isinstance(found, str):
                if folder is not None:
                    _touch(Path(found))
                return Path(found)
        return None

    def blob(self, model: str, etag: str) -> Path:
        """Where the library looks for the content that `etag` names."""
        from huggingface_hub.file_download import repo_folder_name

        return self.folder / repo_folder_name(repo_id=model, repo_type="model") / "blobs" / etag

    def make_room(self, file: str, partial: Path, size: int, commit: str) -> None:
        """Evict broken downloads, then the models used least recently, until `size` bytes of `file` fit in `partial`.

        What is there of `partial` stays, and so does `commit`: it is in use. Raises CheckpointError if there is no
        room, and evicts no model then.
        """
        from huggingface_hub import scan_cache_dir

        cache, others = scan_cache_dir(self.folder), self._partials(partial)
        excess = self._excess(cache.size_on_disk + sum(stat.st_size for stat in others.values()), size, partial)
        for path, stat in sorted(others.items(), key=lambda other: other[1].st_mtime):
            if excess > 0 and path.parent != partial.parent and stat.st_mtime < time.time() - _BROKEN_S:
                path.unlink(missing_ok=True)
                excess -= stat.st_size
        revisions = [found for repo in cache.repos for found in repo.revisions if found.commit_hash != commit]
        revisions.sort(key=lambda found: max((file.blob_last_accessed for file in found.files), default=0))
        doomed = cache.delete_revisions()
        for count in range(1, len(revisions) + 1):
            if doomed.expected_freed_size >= excess:
                break
            doomed = cache.delete_revisions(*(found.commit_hash for found in revisions[:count]))
        excess -= doomed.expected_freed_size
        if excess > 0:
            raise CheckpointError(
                f"{file} needs {excess / 1e9:.1f} GB more than {self.folder} may hold: make room on that disk, "
                "or raise PETAL_CACHE_GB."
            )
        doomed.execute()

    def _partials(self, ours: Path) -> dict[Path, os.stat_result]:
        """What there is of downloads other than `ours`."""
        found = {}
        for path in self.folder.glob(f"*/blobs/*{_PARTIAL}"):
            with suppress(FileNotFoundError):  # another process has finished it
                found[path] = path.stat()
        found.pop(ours, None)
        return found

    def _excess(self, used: int, size: int, partial: Path) -> int:
        """Bytes that are too many if `size` come on top of `used`."""
        written = partial.stat().st_size if partial.exists() else 0
        excess = size - written + _MARGIN - shutil.disk_usage(self.folder).free
        return excess if self.limit is None else max(excess, used + size - self.limit)


class HubFolder:
    """The files of a hub model at one commit: what `revision` was when the first file was asked for.

    A file comes from our cache, or huggingface_hub's, or the hub. Where the hub does not answer, or HF_HUB_OFFLINE is
    set, what is cached is all there is.
    """

    def __init__(self, name: str, revision: str = "main", cache: HubCache | None = None) -> None:
        self.name, self.revision = name, revision
        self._cache = cache or HubCache.of_user()
        self._commit = revision if _COMMIT.fullmatch(revision) else None
        self._found: dict[str, Path | None] = {}

    @classmethod
    def parse(cls, model: str) -> HubFolder:
        """From `org/name` or `org/name@revision`."""
        name, _, revision = model.partition("@")
        return cls(name, revision or "main")

    def __str__(self) -> str:
        return self.name

    def find(self, file: str) -> Path | None:
        """Path of `file` on this machine, fetched first if need be; None if the model has no such file.

        Raises CheckpointError if the hub cannot be reached, or refuses, or there is no room on the disk.
        """
        if file not in self._found:
            if Path(file).suffix not in _ALLOWED or Path(file).name != file:
                raise CheckpointError(f"{self.name}: {file} is not fetched: only safetensors, JSON and text files are.")
            self._found[file] = self._fetch(file)
        return self._found[file]

    def describe(self, shard: str) -> Mapping[str, TensorInfo] | None:
        """Tensors of a shard, from its header alone; None if the shard is here already."""
        revision = self._commit or self.revision
        if self._found.get(shard) or isinstance(self._cache.find(self.name, shard, revision), Path):
            return None
        return self._call(shard, lambda: self._header(shard, revision))

    def _fetch(self, file: str) -> Path | None:
        if self._commit is None:
            return self._pin(file)
        known = self._cache.find(self.name, file, self._commit)
        if known is None:
            return self._download(file, self._commit)
        return known if isinstance(known, Path) else None

    def _pin(self, file: str) -> Path | None:
        """The first file, whose commit is that of all others, whatever is pushed meanwhile."""
        try:
            path = self._download(file, self.revision)
            if path is None:
                raise CheckpointError(f"{self.name} has no {file}: give a model with config.json.")
        except _Unreachable:
            known = self._cache.find(self.name, file, self.revision)
            if known is None:
                raise
            path = known if isinstance(known, Path) else None
        if path is not None:
            self._commit = path.parent.name
        return path

    def _download(self, file: str, revision: str) -> Path | None:
        """Have the library link a file that is here whole, or remember that there is none."""
        remote = self._call(file, lambda: self._metadata(file, revision))
        if remote is None and self._commit is None:
            return None
        from huggingface_hub import hf_hub_download

        def link() -> str:
            return hf_hub_download(
                self.name, file, revision=revision, cache_dir=self._cache.folder, etag_timeout=_ANSWER_S
            )

        try:
            if remote is not None:
                self._complete(file, remote)
            path = self._call(file, link)
        except OSError as error:
            raise CheckpointError(
                f"{self._cache.folder} cannot be written ({error.strerror}): make room on that disk."
            ) from error
        return None if path is None else Path(path)

    def _complete(self, file: str, remote: Any) -> None:
        """Bring the content of a file into the cache, from where a broken download of it stopped."""
        from huggingface_hub.utils import WeakFileLock

        etag, commit, size = remote.etag or "", remote.commit_hash or "", remote.size
        if not _ETAG.fullmatch(etag) or not _COMMIT.fullmatch(commit) or size is None:
            raise CheckpointError(f"{self.name}: {remote.location} does not answer as a hub does: check HF_ENDPOINT.")
        if isinstance(self._cache.find(self.name, file, commit), Path):
            return
        blob = self._cache.blob(self.name, etag)
        partial = blob.with_name(etag + _PARTIAL)
        locks = self._cache.folder / ".locks"
        for folder in (locks, blob.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(locks / f"{etag}.lock"):
            if blob.exists():
                return
            if partial.exists() and partial.stat().st_size > size:
                partial.unlink()
            self._cache.make_room(file, partial, size, commit)
            try:
                self._call(file, lambda: self._append(file, commit, partial, size))
                if partial.stat().st_size == size:  # else the file has gone meanwhile
                    partial.replace(blob)
            except OSError:
                partial.unlink(missing_ok=True)
                raise

    def _append(self, file: str, commit: str, partial: Path, size: int) -> None:
        from huggingface_hub.file_download import hf_hub_url, http_get
        from huggingface_hub.utils import build_hf_headers

        with partial.open("ab") as stream:
            http_get(
                hf_hub_url(self.name, file, revision=commit),
                stream,
                resume_size=stream.tell(),
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=file,
            )

    def _metadata(self, file: str, revision: str) -> Any:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        return get_hf_file_metadata(hf_hub_url(self.name, file, revision=revision), timeout=_ANSWER_S)

    def _header(self, shard: str, revision: str) -> dict[str, TensorInfo]:
        from huggingface_hub import HfApi

        found = HfApi().parse_safetensors_file_metadata(self.name, shard, revision=revision).tensors
        return {
            name: TensorInfo(name, tuple(info.shape), info.dtype, info.data_offsets[1] - info.data_offsets[0])
            for name, info in found.items()
        }

    def _call(self, file: str, request: Callable[[], Any]) -> Any:
        """Run a hub request; None if there is no such file, CheckpointError in one sentence for any other failure."""
        from huggingface_hub import errors

        try:
            return request()
        except errors.GatedRepoError as error:
            raise CheckpointError(
                f"{self.name} is gated: accept its terms on the hub, then `hf auth login`."
            ) from error
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
            raise CheckpointError(
                f"{self.name} is not on the hub, or not at this revision: check the spelling."
            ) from error
        except errors.LocalEntryNotFoundError as error:  # its kin below says that a hub has no such file
            raise _unreachable(self.name, file, error) from error
        except errors.EntryNotFoundError:
            return None
        except OSError as error:
            if error.errno in _DISK:
                raise
            raise _unreachable(self.name, file, error) from error
        # Every client library below has its own network errors; CheckpointError is what a caller can act on.
        except Exception as error:
            raise _unreachable(self.name, file, error) from error


class _Unreachable(CheckpointError):
    """The hub does not answer."""


def _unreachable(name: str, file: str, error: Exception) -> _Unreachable:
    return _Unreachable(
        f"{name}: {file} is not cached and the hub cannot be reached ({type(error).__name__}): connect and try again."
    )


def _touch(path: Path) -> None:
    """Note a use. The time of writing stays: digests are kept by it."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except OSError:  # of somebody else; then the file system notes it, or nobody
        return
