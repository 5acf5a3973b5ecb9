"""Models on the Hugging Face hub: only the files asked for are fetched, and never code or pickle."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint_layout import CheckpointError, TensorInfo

_ALLOWED = {".safetensors", ".json", ".jinja", ".txt"}
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass
class HubFolder:
    """The files of a hub model at one revision; the first file fetched fixes the commit for all others."""

    name: str
    revision: str | None = None
    _found: dict[str, Path | None] = field(default_factory=dict)

    @classmethod
    def parse(cls, model: str) -> HubFolder:
        """From `org/name` or `org/name@revision`."""
        name, _, revision = model.partition("@")
        return cls(name, revision or None)

    def __str__(self) -> str:
        return self.name

    def find(self, file: str) -> Path | None:
        """Path of `file` in the local cache, fetched first if need be; None if the model has no such file.

        Raises CheckpointError if the hub cannot be reached, or refuses.
        """
        if file not in self._found:
            self._found[file] = self._fetch(file)
        return self._found[file]

    def describe(self, shard: str) -> Mapping[str, TensorInfo] | None:
        """Tensors of a shard, from its header alone; None if the shard is here already."""
        if self._found.get(shard) or _cached(self.name, shard, self.revision):
            return None
        return _call(self.name, shard, lambda: _remote_header(self.name, shard, self.revision))

    def _fetch(self, file: str) -> Path | None:
        if Path(file).suffix not in _ALLOWED:
            raise CheckpointError(f"{self.name}: {file} is not fetched: only safetensors, JSON and text files are.")
        path: Path | None = _call(self.name, file, lambda: _download(self.name, file, self.revision))
        if path is not None and _COMMIT.fullmatch(path.parent.name):
            self.revision = path.parent.name
        return path


def _download(repo: str, file: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, file, revision=revision))


def _cached(repo: str, file: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, file, revision=revision), str)


def _remote_header(repo: str, file: str, revision: str | None) -> dict[str, TensorInfo]:
    from huggingface_hub import HfApi

    tensors = HfApi().parse_safetensors_file_metadata(repo, file, revision=revision).tensors
    return {
        name: TensorInfo(name, tuple(info.shape), info.dtype, info.data_offsets[1] - info.data_offsets[0])
        for name, info in tensors.items()
    }


def _call(repo: str, file: str, request: Any) -> Any:
    """Run a hub request; None if there is no such file, CheckpointError in one sentence for any other failure."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise CheckpointError(f"{repo}: fetching from the hub needs a library: pip install huggingface_hub.") from error
    try:
        return request()
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{repo} is gated: accept its terms on the hub, then `hf auth login`.") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise CheckpointError(f"{repo} is not on the hub, or not at this revision: check the spelling.") from error
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(f"{repo}: {file} is not cached and the hub cannot be reached: connect once.") from error
    except errors.EntryNotFoundError:
        return None
    # Every client library below has its own network errors; CheckpointError is what a caller can act on.
    except Exception as error:
        raise CheckpointError(f"{repo}: fetching {file} failed ({type(error).__name__}): try again.") from error
