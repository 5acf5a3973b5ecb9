"""What a drafter learns from: rows of token ids of one length, and what the target thought of them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...protocol.checkpoint.tokenizer import Tokenizer
from .shape import DistillError


@dataclass(frozen=True)
class Texts:
    """ids: int32 [rows, length]. own: bool [rows, length], which of them count: the target's own words.

    A swarm's target is not at hand later, so what it said of each own token's place comes along: the likeliest ids,
    int32 [rows, length, k], and their log-probabilities, float32 [rows, length, k].
    """

    ids: Tensor
    own: Tensor
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> Texts:
        return Texts(*(None if x is None else x[rows] for x in self._tensors()))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Texts:
        """The same on a device."""
        return Texts(*(None if x is None else x.to(device) for x in self._tensors()))  # type: ignore[arg-type]

    def _tensors(self) -> tuple[Tensor | None, ...]:
        return (self.ids, self.own, self.top_ids, self.top_logprobs)

    def save(self, path: Path, seconds: float) -> None:
        """Write in one atomic step, with the time that it took to make."""
        names = ("ids", "own", "top_ids", "top_logprobs")
        part = path.with_suffix(".part")
        named = {name: x for name, x in zip(names, self._tensors(), strict=True) if x is not None}
        save_file({**named, "seconds": torch.tensor(seconds)}, part)
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> tuple[Texts, float]:
        """What `save` wrote."""
        found = load_file(path)
        return cls(found["ids"], found["own"], found.get("top_ids"), found.get("top_logprobs")), float(found["seconds"])


def joined(parts: list[Texts]) -> Texts:
    """All rows of several, which are alike."""
    columns = zip(*(part._tensors() for part in parts), strict=True)
    return Texts(*(None if column[0] is None else torch.cat(list(column)) for column in columns))  # type: ignore


def texts_of(path: Path, tokenizer: Tokenizer, length: int) -> Texts:
    """Rows from a UTF-8 text file, or one of JSON lines with a field "text". Raises DistillError."""
    try:
        written = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DistillError(f"{path} cannot be read as UTF-8 text: give a .txt or .jsonl file with --data.") from error
    documents = [written]
    if path.suffix == ".jsonl":
        try:
            documents = [str(json.loads(line)["text"]) for line in written.splitlines() if line.strip()]
        except (ValueError, KeyError, TypeError) as error:
            raise DistillError(f'{path} must hold one JSON object with a field "text" a line.') from error
    end = sorted(tokenizer.eos_ids)[:1]
    ids = [id for text in documents if text.strip() for id in [*tokenizer.encode(text), *end]]
    rows = len(ids) // length
    if not rows:
        raise DistillError(f"{path} holds {len(ids)} tokens, fewer than one row of {length}: give more text.")
    matrix = torch.tensor(ids[: rows * length], dtype=torch.int32).view(rows, length)
    return Texts(matrix, torch.ones_like(matrix, dtype=torch.bool))
