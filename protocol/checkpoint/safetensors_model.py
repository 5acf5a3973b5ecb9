"""A model stored as safetensors, in one file or in shards, with its config and tokenizer beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .checkpoint import Checkpoint
from .generation_defaults import GenerationDefaults, generation_defaults
from .json_files import Finder, read_json
from .layout import CheckpointError, TensorInfo, text_config
from .safetensors import SafetensorsFile
from .tokenizer import Tokenizer
from .tokenizer_files import folder_tokenizer

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Folder(Finder, Protocol):
    """Where a model's files are: on disk or on a hub."""

    name: str

    def describe(self, shard: str) -> Mapping[str, TensorInfo] | None:
        """Tensors of a shard where they can be had without the whole shard."""


class LocalFolder:
    """A folder on disk."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.resolve().name

    def __str__(self) -> str:
        return str(self.path)

    def find(self, file: str) -> Path | None:
        """See Finder.find."""
        path = self.path / file
        return path if path.is_file() else None

    def describe(self, shard: str) -> None:
        """See Folder.describe: the header is at hand in the shard itself."""
        return


class SafetensorsCheckpoint(Checkpoint):
    """A model in `folder`; `weights` names the single weights file, else the index or model.safetensors decides."""

    def __init__(self, folder: Folder, cache: Path | None = None, weights: str | None = None) -> None:
        self._folder = folder
        self._open: dict[str, SafetensorsFile] = {}
        config = read_json(folder, "config.json")
        if config is None:
            raise CheckpointError(f"{folder} has no config.json: give a folder with config.json and safetensors files.")
        self._shards = self._weight_map(weights)
        tensors = _Tensors(self, self._shards)
        self._describe(folder.name, config, tensors, cache)

    def read(self, name: str) -> npt.NDArray[Any]:
        """See Checkpoint.read."""
        self.info(name)
        return self._shard(self._shards[name]).read(name)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """See Checkpoint.raw."""
        self.info(name)
        return self._shard(self._shards[name]).raw(name)

    def forget(self, view: npt.NDArray[Any]) -> None:
        """See Checkpoint.forget."""
        for file in self._open.values():
            file.forget(view)

    def files(self, names: Iterable[str]) -> set[Path]:
        """See Checkpoint.files."""
        return {self._shard(shard).path for shard in sorted({self._shards[self._known(name)] for name in names})}

    def tokenizer(self) -> Tokenizer:
        """See Checkpoint.tokenizer."""
        return self._suiting(folder_tokenizer(self._folder, self.config))

    def generation_defaults(self) -> GenerationDefaults:
        """See Checkpoint.generation_defaults."""
        return generation_defaults(self.config, read_json(self._folder, "generation_config.json") or {}, self.name)

    def close(self) -> None:
        """See Checkpoint.close."""
        for file in self._open.values():
            file.close()
        self._open.clear()

    def shard_infos(self, shard: str) -> Mapping[str, TensorInfo]:
        """Descriptions of a shard's tensors, from the shard if it is here, else from its header alone."""
        remote = None if shard in self._open else self._folder.describe(shard)
        infos = self._shard(shard).tensors if remote is None else remote
        self._check(shard, infos)
        return infos

    def _known(self, name: str) -> str:
        if name not in self._shards:
            raise CheckpointError(f"{self.name} holds no tensor {name}.")
        return name

    def _shard(self, shard: str) -> SafetensorsFile:
        if shard not in self._open:
            path = self._folder.find(shard)
            if path is None:
                raise CheckpointError(f"{self._folder} lacks {shard}: get all the files of the span.")
            self._open[shard] = SafetensorsFile(path)
        return self._open[shard]

    def _weight_map(self, weights: str | None) -> dict[str, str]:
        index = None if weights else read_json(self._folder, _INDEX)
        if index is None:
            return dict.fromkeys(self._shard(weights or _WEIGHTS).tensors, weights or _WEIGHTS)
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(_is_shard_name(shard) for shard in shards.values()):
            raise CheckpointError(f"{self._folder}: {_INDEX} must map tensors to .safetensors files beside it.")
        return shards

    def _check(self, shard: str, infos: Mapping[str, TensorInfo]) -> None:
        missing = [name for name, place in self._shards.items() if place == shard and name not in infos]
        if missing:
            raise CheckpointError(f"{self._folder}: {shard} lacks the tensor {missing[0]}: download it again.")
        rows = text_config(self.config).get("vocab_size")
        matrix = infos.get(self.layout.token_matrix)
        if matrix is not None and rows is not None and (len(matrix.shape) != 2 or matrix.shape[0] != rows):
            raise CheckpointError(
                f"{self._folder}: {matrix.name} has shape {list(matrix.shape)}, the config asks for {rows} rows."
            )


class _Tensors(Mapping[str, TensorInfo]):
    """Names from the index; a shard's header is read when one of its tensors is first looked at."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, shards: Mapping[str, str]) -> None:
        self._checkpoint, self._shards = checkpoint, shards
        self._infos: dict[str, Mapping[str, TensorInfo]] = {}

    def __getitem__(self, name: str) -> TensorInfo:
        shard = self._shards[name]
        if shard not in self._infos:
            self._infos[shard] = self._checkpoint.shard_infos(shard)
        return self._infos[shard][name]

    def __contains__(self, name: object) -> bool:
        return name in self._shards

    def __iter__(self) -> Iterator[str]:
        return iter(self._shards)

    def __len__(self) -> int:
        return len(self._shards)


def _is_shard_name(name: Any) -> bool:
    """True for a plain file name: an index must not lead out of its folder."""
    return isinstance(name, str) and name.endswith(".safetensors") and not set(name) & {"/", "\\", ":", "\0"}
