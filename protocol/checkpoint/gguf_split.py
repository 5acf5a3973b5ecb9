"""A model in several GGUF files, as llama.cpp's gguf-split writes them: NAME-00001-of-00003.gguf and its siblings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .gguf import GgufFile
from .layout import CheckpointError

_PART = re.compile(r"(?P<name>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})")


class SplitGguf:
    """All parts as one file; metadata are those of the first. See GgufFile."""

    def __init__(self, parts: list[GgufFile]) -> None:
        self.path, self.metadata = parts[0].path, parts[0].metadata
        self._parts = parts
        self._places = {name: part for part in parts for name in part.tensors}
        self.tensors = {name: part.tensors[name] for name, part in self._places.items()}
        stored, promised = sum(len(part.tensors) for part in parts), self.metadata.get("split.tensors.count")
        if stored != len(self.tensors) or promised not in (None, stored):
            raise CheckpointError(
                f"{self.path} promises {promised} tensors, its {len(parts)} parts hold {len(self.tensors)}: "
                "get all parts of one model again."
            )

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """See GgufFile.raw."""
        return self._places[name].raw(name)

    def file_of(self, name: str) -> Path:
        """See GgufFile.file_of."""
        return self._places[name].path

    def forget(self, view: npt.NDArray[Any]) -> None:
        """See GgufFile.forget."""
        for part in self._parts:
            part.forget(view)

    def close(self) -> None:
        """See GgufFile.close."""
        for part in self._parts:
            part.close()


def open_gguf(path: Path) -> GgufFile | SplitGguf:
    """Open a GGUF file and, where it is one part of a model, its siblings. Raises CheckpointError."""
    file = GgufFile(path)
    count = file.metadata.get("split.count", 1)
    if not isinstance(count, int):
        raise CheckpointError(f"{path} is corrupt: split.count must be a number: download it again.")
    if count < 2:
        return file
    match = _PART.fullmatch(path.stem)
    if match is None or int(match["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts of a model: name it NAME-00001-of-{count:05}.gguf, as gguf-split does, "
            "and its siblings beside it likewise."
        )
    paths = [path.with_name(f"{match['name']}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        raise CheckpointError(f"{path} is one of {count} parts of a model: put {', '.join(missing[:8])} beside it.")
    parts = [GgufFile(part) for part in paths]
    for number, part in enumerate(parts):
        if (part.metadata.get("split.no"), part.metadata.get("split.count")) != (number, count):
            raise CheckpointError(f"{part.path} is not part {number + 1} of {count}: get it again.")
    return SplitGguf(parts)


def model_name(path: Path) -> str:
    """What a file's model is called: its name, that of the whole where it is a part."""
    match = _PART.fullmatch(path.stem)
    return match["name"] if match else path.stem
