"""A GGUF file as a checkpoint: Hugging Face names, shapes and row order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .checkpoint import Checkpoint
from .gguf import GgufFile, StoredTensor
from .gguf_config import Family, family, hf_config
from .gguf_split import SplitGguf, open_gguf
from .layout import CheckpointError, TensorInfo
from .tokenizer import Tokenizer
from .tokenizer_gguf import gguf_tokenizer

_SHARED = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_DENSE = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
# Read through the config, so no weight of the model.
_FOLDED = {"rope_freqs.weight"}


class GgufCheckpoint(Checkpoint):
    """A model in one GGUF file, or in the parts of one."""

    def __init__(self, path: Path, name: str, cache: Path | None = None) -> None:
        self._file = open_gguf(path)
        self._family = family(self._file)[1]
        config = hf_config(self._file)
        self._stored = _by_hf_name(self._file, self._family, config["num_hidden_layers"])
        _check_shapes(self._stored, config, path)
        infos = {key: TensorInfo(key, t.shape, t.kind.name, t.nbytes) for key, t in self._stored.items()}
        self._describe(name, config, infos, cache)

    def read(self, name: str) -> npt.NDArray[Any]:
        """See Checkpoint.read; rows of q and k, and gemma's norms, come as Hugging Face has them."""
        info = self.info(name)
        if info.dtype not in _DENSE:
            raise CheckpointError(f"{self.name}: {name} has the packed type {info.dtype}; its rows can be read packed.")
        values: npt.NDArray[Any] = self._ordered(name).view(_DENSE[info.dtype]).reshape(info.shape)
        if name.endswith("norm.weight") and self._family.norm_offset:
            wide = (values.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else values
            return wide.astype(np.float32) - np.float32(self._family.norm_offset)
        return values

    def forget(self, view: npt.NDArray[Any]) -> None:
        """See Checkpoint.forget."""
        self._file.forget(view)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """See Checkpoint.raw."""
        self.info(name)
        return self._file.raw(self._stored[name].name)

    def packed(self, name: str) -> npt.NDArray[np.uint8]:
        """See Checkpoint.packed; quantized blocks lie within a row, so whole rows can move."""
        super().packed(name)
        return self._ordered(name).reshape(self.tensors[name].shape[0], -1)

    def files(self, names: Iterable[str]) -> set[Path]:
        """See Checkpoint.files."""
        return {self._file.file_of(self._stored[name].name) for name in names}

    def tokenizer(self) -> Tokenizer:
        """See Checkpoint.tokenizer."""
        return self._suiting(gguf_tokenizer(self._file.metadata, self.name))

    def close(self) -> None:
        """See Checkpoint.close."""
        self._file.close()

    def _ordered(self, name: str) -> npt.NDArray[np.uint8]:
        """Stored bytes with the converter's permutation of q and k undone."""
        raw = self.raw(name)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if heads is None or not self._family.permuted:
            return raw
        n_heads, rows = self.config[heads], self.tensors[name].shape[0]
        return raw.reshape(n_heads, rows // n_heads // 2, 2, -1).swapaxes(1, 2).reshape(-1)


def _by_hf_name(file: GgufFile | SplitGguf, kind: Family, n_blocks: int) -> dict[str, StoredTensor]:
    """The tensor table under Hugging Face names; raises CheckpointError if a tensor is unknown or missing."""
    stored: dict[str, StoredTensor] = {}
    for name, tensor in file.tensors.items():
        if name in _FOLDED:
            continue
        stored[_hf_name(name, kind, file.path)] = tensor
    # A block count beyond the table's size is refused before names are made up for it.
    if n_blocks > len(stored):
        raise CheckpointError(f"{file.path}: {n_blocks} blocks are promised but only {len(stored)} tensors are stored.")
    wanted = [f"model.layers.{block}.{module}.weight" for block in range(n_blocks) for module in kind.block.values()]
    missing = [name for name in ["model.norm.weight", *wanted] if name not in stored]
    if missing:
        raise CheckpointError(f"{file.path} lacks {len(missing)} tensors, such as {missing[0]}: get the whole model.")
    return stored


def _hf_name(name: str, kind: Family, path: Path) -> str:
    module, _, field = name.rpartition(".")
    parts = module.split(".", 2)
    if field in ("weight", "bias"):
        if module in _SHARED:
            return f"{_SHARED[module]}.{field}"
        if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal() and parts[2] in kind.block:
            return f"model.layers.{int(parts[1])}.{kind.block[parts[2]]}.{field}"
    raise CheckpointError(f"{path} holds the tensor {name[:80]!r}, which {kind.model_type} does not have.")


def _check_shapes(stored: dict[str, StoredTensor], config: dict[str, Any], path: Path) -> None:
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    query, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj": (query, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, query),
        "gate_proj": (config["intermediate_size"], hidden),
        "up_proj": (config["intermediate_size"], hidden),
        "down_proj": (hidden, config["intermediate_size"]),
        "embed_tokens": (config["vocab_size"], hidden),
        "lm_head": (config["vocab_size"], hidden),
        "q_norm": (head_dim,),
        "k_norm": (head_dim,),
    }
    if head_dim % 2 or config["num_attention_heads"] % config["num_key_value_heads"]:
        raise CheckpointError(f"{path}: head size {head_dim} must be even and query heads a multiple of key heads.")
    for name, tensor in stored.items():
        *_, module, field = name.split(".")
        shape = shapes.get(module, (hidden,))
        wanted = shape if field == "weight" else shape[:1]
        if tensor.shape != wanted:
            raise CheckpointError(f"{path}: {name} has shape {list(tensor.shape)}, the config asks for {list(wanted)}.")
