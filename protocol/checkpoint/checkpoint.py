"""A model opened for reading, whatever its storage."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .digest import DigestCache, model_digest
from .generation_defaults import GenerationDefaults, generation_defaults
from .layout import CheckpointError, Layout, TensorInfo, arrange, text_config
from .tokenizer import Tokenizer

# Values converted at a time.
_CHUNK = 1 << 20


class Checkpoint(ABC):
    """Tensors, config and tokenizer of one model. Tensor names are Hugging Face's.

    Nothing is loaded before it is read, so reading a span costs that span and at most one tensor more.
    """

    name: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    layout: Layout

    def _describe(
        self, name: str, config: dict[str, Any], tensors: Mapping[str, TensorInfo], cache: Path | None
    ) -> None:
        """Set what every checkpoint has; raises CheckpointError if tensors and config disagree."""
        self.name, self.config, self.tensors = name, config, tensors
        self.layout = arrange(tensors, config, name)
        self._digests = DigestCache(cache)

    @property
    def n_blocks(self) -> int:
        """Number of transformer blocks."""
        return len(self.layout.blocks)

    @abstractmethod
    def read(self, name: str) -> npt.NDArray[Any]:
        """Dense values in the tensor's shape: float32, float16, or for dtype "BF16" its bits as uint16.

        They may be a read-only view of the file. Raises CheckpointError for an unknown name or a packed type.
        """

    @abstractmethod
    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes, untouched: a flat read-only view of the file."""

    @abstractmethod
    def files(self, names: Iterable[str]) -> set[Path]:
        """The files on this machine that store `names`, fetched first if need be."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises CheckpointError if it has none that can be read, or another model's."""

    def generation_defaults(self) -> GenerationDefaults:
        """What its makers want generation to be like, whether or not there is a tokenizer."""
        return generation_defaults(self.config, {}, self.name)

    def _suiting(self, tokenizer: Tokenizer) -> Tokenizer:
        """The tokenizer, unless it makes ids that the model has no rows for."""
        rows = text_config(self.config).get("vocab_size")
        if isinstance(rows, int) and tokenizer.trained_size > rows:
            raise CheckpointError(
                f"{self.name}: its tokenizer has {tokenizer.trained_size} tokens, the model has {rows}: get the one "
                "that belongs to it."
            )
        return tokenizer

    def vocab_digest(self) -> str:
        """`Tokenizer.vocab_digest` of the model; a drafter may have it in its config, in place of a tokenizer.

        Raises CheckpointError where it cannot be known.
        """
        stored = self.config.get("vocab_digest")
        return stored if isinstance(stored, str) else self.tokenizer().vocab_digest

    def one_matrix(self) -> bool:
        """Whether the head is the token matrix: tied, or stored once more. Reads both where they are stored."""
        if self.layout.tied or len(self.layout.head) != 1:
            return self.layout.tied
        matrices = [self.info(name) for name in (self.layout.token_matrix, *self.layout.head)]
        if len({(info.shape, info.dtype) for info in matrices}) > 1:
            return False
        first, second = (self.raw(info.name) for info in matrices)
        equal = np.array_equal(first, second)
        self.forget(first)
        self.forget(second)
        return equal

    def draft_vocabulary(self) -> npt.NDArray[np.int64] | None:
        """Rising token ids [n] that a drafter with a trimmed LM head proposes; None if it proposes all.

        Raises CheckpointError where the config lists anything else.
        """
        listed = self.config.get("draft_vocabulary")
        if listed is None:
            return None
        rows = self.info(self.layout.token_matrix).shape[0]
        sound = isinstance(listed, list) and listed and all(type(id) is int and 0 <= id < rows for id in listed)
        if not sound or any(after <= before for before, after in pairwise(listed)):
            raise CheckpointError(f"{self.name}: draft_vocabulary must list rising token ids from 0 to {rows - 1}.")
        return np.array(listed, np.int64)

    @abstractmethod
    def close(self) -> None:
        """Let go of the files. Arrays already read stay valid."""

    def packed(self, name: str) -> npt.NDArray[np.uint8]:
        """Stored bytes by row, uint8 [rows, bytes of a row], in the order in which `read` gives the rows.

        Raises CheckpointError unless the tensor is a matrix.
        """
        info = self.info(name)
        if len(info.shape) != 2:
            raise CheckpointError(f"{self.name}: {name} has shape {list(info.shape)}, only a matrix has packed rows.")
        return self.raw(name).reshape(info.shape[0], -1)

    def read_f32(self, name: str) -> npt.NDArray[np.float32]:
        """Like `read`, as a fresh float32 array; pages of the file that only this reading needed are let go."""
        stored = self.read(name)
        if stored.dtype == np.float32 and stored.flags.writeable:
            return stored
        wide = np.empty(stored.shape, np.uint32 if stored.dtype == np.uint16 else np.float32)
        source, target = stored.reshape(-1), wide.reshape(-1)
        for start in range(0, len(source), _CHUNK):
            target[start : start + _CHUNK] = source[start : start + _CHUNK]
            self.forget(source[start : start + _CHUNK])
        if stored.dtype == np.uint16:
            np.left_shift(wide, 16, out=wide)
        return wide.view(np.float32)

    @abstractmethod
    def forget(self, view: npt.NDArray[Any]) -> None:
        """Let go of the memory behind a view of a file that nobody looks at any more."""

    def info(self, name: str) -> TensorInfo:
        """Description of one tensor; raises CheckpointError for an unknown name."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.name} holds no tensor {name}.")
        return self.tensors[name]

    def block_tensors(self, block: int) -> list[str]:
        """Sorted names of one block's tensors."""
        if not 0 <= block < self.n_blocks:
            raise CheckpointError(f"{self.name} has blocks 0 to {self.n_blocks - 1}, not {block}.")
        return list(self.layout.blocks[block])

    def shared_tensors(self) -> dict[str, list[str]]:
        """Names outside the blocks, by "embedding", "norm" and "head"; a tied head lists the token matrix."""
        return {part: list(self.layout.part(part)) for part in ("embedding", "norm", "head")}

    def span_tensors(self, start: int, end: int) -> dict[str, list[str]]:
        """Names of what a peer with blocks [start, end) hosts, by part.

        Keys are block numbers in decimal, "embedding" if start is 0, "norm" and "head" if end is n_blocks.
        """
        if not 0 <= start < end <= self.n_blocks:
            raise CheckpointError(f"{self.name} has blocks [0, {self.n_blocks}), [{start}, {end}) is no span of it.")
        around = (["embedding"] if start == 0 else []) + (["norm", "head"] if end == self.n_blocks else [])
        parts = {str(block): self.block_tensors(block) for block in range(start, end)}
        return parts | {part: list(self.layout.part(part)) for part in around}

    def digest(self) -> str:
        """The model digest: sha256 in hex over config and tensor names."""
        return model_digest(self.config, self.tensors)

    def block_digests(self, start: int, end: int) -> dict[str, str]:
        """Digests of the stored bytes that a peer with blocks [start, end) hosts, by part as in `span_tensors`."""
        same = {"head": "embedding"} if self.layout.head == self.layout.embedding else {}
        return {part: self._digests.get(self, same.get(part, part)) for part in self.span_tensors(start, end)}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
