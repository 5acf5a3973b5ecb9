"""The checkpoint in the making: one shard a block, and all that a run needs to go on after a kill.

Files appear whole or not at all. What only the run needs, above all the hidden states that enter the next block, lies
in a folder "unfinished"; config.json comes last, and makes the folder a model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.layout import CheckpointError, TensorInfo
from ...protocol.checkpoint.safetensors import SafetensorsFile
from ..model.dense import read_dense

_DENSE = {"F32", "F16", "BF16"}
Describe = Callable[[Mapping[str, Sequence[int]]], dict[str, Any]]


class Folder:
    """The folder `out` of a model with `n_blocks` blocks."""

    def __init__(self, out: Path, n_blocks: int) -> None:
        self.out, self._work, self._n_blocks = out, out / "unfinished", n_blocks

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make this run's place. Raises CheckpointError where something else is in it."""
        if (self.out / "config.json").exists():
            raise CheckpointError(f"{self.out} holds a finished model: give another --out.")
        path = self._work / "settings.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            raise CheckpointError(f"{self.out} holds an unfinished run of other settings: give another --out.")
        self._work.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(settings))

    def state(self) -> tuple[int, dict[str, Tensor]]:
        """The next block, and the hidden states that were saved with it: (0, {}) at the start."""
        saved = [int(path.stem.rpartition("-")[2]) for path in self._work.glob("hidden-*.safetensors")]
        block = max(saved, default=0)
        return (block, load_file(self._hidden(block))) if saved else (0, {})

    def save_state(self, block: int, hidden: Mapping[str, Tensor]) -> None:
        """Blocks before `block` are done; `hidden` enters it."""
        _save(self._hidden(block), hidden)
        if block:
            self._hidden(block - 1).unlink(missing_ok=True)

    def save_block(self, block: int, tensors: Mapping[str, Tensor], errors: Mapping[str, float]) -> None:
        """Write a block's shard, and keep its linears' relative errors, by path."""
        _write(self._work / f"errors-{block}.json", json.dumps(dict(errors)))
        _save(self._shard(block), tensors)

    def errors(self) -> dict[str, float]:
        """Relative errors of all blocks' linears, by path."""
        found: dict[str, float] = {}
        for block in range(self._n_blocks):
            found.update(json.loads((self._work / f"errors-{block}.json").read_text()))
        return found

    def finish(self, checkpoint: Checkpoint, describe: Describe, texts: Mapping[str, str]) -> None:
        """Write what is around the blocks, and `texts` by file name; then the model is complete.

        describe: shapes of all tensors -> the config's `quantization_config`.
        """
        in_blocks = {name for names in checkpoint.layout.blocks for name in names}
        others = [name for name in checkpoint.tensors if name not in in_blocks]
        _save(self._shard(self._n_blocks), {name: stored(checkpoint, name) for name in others})
        shapes = self._write_index()
        for name, text in texts.items():
            _write(self.out / name, text)
        config = {**checkpoint.config, "quantization_config": describe(shapes)}
        _write(self.out / "config.json", json.dumps(config, indent=2) + "\n")
        shutil.rmtree(self._work)

    def _write_index(self) -> dict[str, Sequence[int]]:
        """Say which tensor is in which shard; shapes of all of them."""
        places: dict[str, str] = {}
        infos: dict[str, TensorInfo] = {}
        for number in range(self._n_blocks + 1):
            path = self._shard(number)
            file = SafetensorsFile(path)
            places.update(dict.fromkeys(file.tensors, path.name))
            infos.update(file.tensors)
            file.close()
        size = sum(info.nbytes for info in infos.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        _write(self.out / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        return {name: info.shape for name, info in infos.items()}

    def _shard(self, number: int) -> Path:
        return self.out / f"model-{number + 1:05}-of-{self._n_blocks + 1:05}.safetensors"

    def _hidden(self, block: int) -> Path:
        return self._work / f"hidden-{block}.safetensors"


def unquantized(checkpoint: Checkpoint, block: int, quantized: Iterable[str]) -> dict[str, Tensor]:
    """A block's tensors as stored, but the weights of linears that are quantized, by path."""
    left = set(checkpoint.block_tensors(block)) - {f"{path}.weight" for path in quantized}
    return {name: stored(checkpoint, name) for name in sorted(left)}


def stored(checkpoint: Checkpoint, name: str) -> Tensor:
    """A tensor in its stored type; float16 for what a GGUF file packs."""
    dtype = checkpoint.info(name).dtype
    if dtype not in _DENSE:
        return read_dense(checkpoint, name).half()
    values = torch.from_numpy(np.array(checkpoint.read(name)))
    return values.view(torch.bfloat16) if dtype == "BF16" else values


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    part = path.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"format": "pt"})
    os.replace(part, path)


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)
