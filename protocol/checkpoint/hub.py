"""Models on the Hugging Face hub: only the files asked for are fetched, and never code or pickle."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .hub_cache import HubCache
from .layout import CheckpointError, TensorInfo

_ALLOWED = {".safetensors", ".json", ".jinja", ".txt"}
_COMMIT = re.compile(r"[0-9a-f]{40}")
# A hub that is there answers sooner.
_ANSWER_S = 5.0
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO}


class HubFolder:
    """The files of a hub model at one commit: what `revision` was when the first file was asked for.

    A file comes from our cache, or huggingface_hub's, or the hub; a download that broke off goes on where it stopped.
    Where the hub does not answer, or HF_HUB_OFFLINE is set, what is cached is all there is.
    """

    def __init__(
        self, name: str, revision: str = "main", cache: HubCache | None = None, endpoint: str | None = None
    ) -> None:
        self.name, self.revision = name, revision
        self._cache = cache or HubCache.of_user()
        self._endpoint = endpoint
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
            if Path(file).suffix not in _ALLOWED:
                raise CheckpointError(f"{self.name}: {file} is not fetched: only safetensors, JSON and text files are.")
            self._found[file] = self._fetch(file)
        return self._found[file]

    def describe(self, shard: str) -> Mapping[str, TensorInfo] | None:
        """Tensors of a shard, from its header alone; None if the shard is here already."""
        if self._found.get(shard) or self._cached(self._commit_for(shard), shard):
            return None
        return self._call(shard, lambda: self._header(shard))

    def _fetch(self, file: str) -> Path | None:
        commit = self._commit_for(file)
        if path := self._cached(commit, file):
            return path
        if self._cache.is_absent(self.name, commit, file):
            return None
        remote = self._call(file, lambda: self._metadata(file, commit))
        if remote is None:
            self._cache.note_absent(self.name, commit, file)
            return None
        return self._download(file, commit, int(remote.size))

    def _commit_for(self, file: str) -> str:
        """One commit for all files, whatever is pushed meanwhile; `file` is any that may exist."""
        if self._commit is None:
            try:
                remote = self._call(file, lambda: self._metadata(file, self.revision))
            except _Unreachable:
                self._commit = self._cache.commit_of(self.name, self.revision)
                if self._commit is None:
                    raise
            else:
                if remote is None or not _COMMIT.fullmatch(remote.commit_hash or ""):
                    raise CheckpointError(f"{self.name} has no {file}: give a model with config.json.")
                self._commit = str(remote.commit_hash)
                self._cache.note_commit(self.name, self.revision, self._commit)
        return self._commit

    def _cached(self, commit: str, file: str) -> Path | None:
        if path := self._cache.find(self.name, commit, file):
            return path
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, file, revision=commit)
        return Path(found) if isinstance(found, str) else None

    def _metadata(self, file: str, revision: str) -> Any:
        from huggingface_hub import get_hf_file_metadata

        return get_hf_file_metadata(self._url(file, revision), timeout=_ANSWER_S)

    def _url(self, file: str, revision: str) -> str:
        from huggingface_hub import hf_hub_url

        return str(hf_hub_url(self.name, file, revision=revision, endpoint=self._endpoint))

    def _header(self, shard: str) -> dict[str, TensorInfo]:
        from huggingface_hub import HfApi

        found = HfApi(self._endpoint).parse_safetensors_file_metadata(self.name, shard, revision=self._commit).tensors
        return {
            name: TensorInfo(name, tuple(info.shape), info.dtype, info.data_offsets[1] - info.data_offsets[0])
            for name, info in found.items()
        }

    def _download(self, file: str, commit: str, size: int) -> Path:
        """Fetch a file whole; what a broken download leaves behind is where the next one goes on."""
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        target = self._cache.place(self.name, commit, file)
        partial = self._cache.make_room(target, size)

        def fetch() -> None:
            with partial.open("ab") as stream:
                http_get(
                    self._url(file, commit),
                    stream,
                    resume_size=stream.tell(),
                    headers=build_hf_headers(),
                    expected_size=size,
                    displayed_filename=file,
                )

        try:
            self._call(file, fetch)
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"{target} cannot be written ({error.strerror}): make room on that disk.") from error
        return target

    def _call(self, file: str, request: Callable[[], Any]) -> Any:
        """Run a hub request; None if there is no such file, CheckpointError in one sentence for any other failure."""
        try:
            from huggingface_hub import errors
        except ImportError as error:
            hint = "fetching from the hub needs a library: pip install huggingface_hub."
            raise CheckpointError(f"{self.name}: {hint}") from error
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
