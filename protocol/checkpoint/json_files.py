"""JSON files of a model folder, bounded and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from .layout import CheckpointError

MAX_JSON = 100_000_000


class Finder(Protocol):
    """Finds a model's files by name; None for a file that does not exist."""

    def find(self, file: str) -> Path | None:
        """Path of `file` on this machine, fetched first if need be."""


def read_json(folder: Finder, file: str) -> dict[str, Any] | None:
    """A JSON object of the folder, None if the file does not exist; raises CheckpointError if it is broken."""
    path = folder.find(file)
    if path is None:
        return None
    try:
        with path.open("rb") as stream:
            text = stream.read(MAX_JSON + 1)
        found = json.loads(text) if len(text) <= MAX_JSON else None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no valid JSON: download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object of at most {MAX_JSON} bytes.")
    return found
