"""Calibration text as rows of token ids, some of them held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...protocol.checkpoint.layout import CheckpointError
from ...protocol.checkpoint.tokenizer import Tokenizer

_HELD_OUT = 0.1


@dataclass(frozen=True)
class Rows:
    """Token ids: what the weights are fitted to [n, length], and what tells how well [m, length]."""

    fitted: Tensor
    held_out: Tensor


def read_rows(path: Path, tokenizer: Tokenizer, length: int, tokens: int) -> Rows:
    """The text in rows of `length` tokens, at most `tokens` of them fitted; every tenth row is held out.

    Raises CheckpointError for a text that cannot be read or is too short.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as text: {error}.") from error
    ids = tokenizer.encode(text)
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    held_out = torch.arange(len(rows)) % round(1 / _HELD_OUT) == round(1 / _HELD_OUT) - 1
    if not held_out.any():
        least = round(1 / _HELD_OUT) * length
        raise CheckpointError(f"{path} holds {len(ids)} tokens: give at least {least}, or shorter rows with --length.")
    return Rows(rows[~held_out][: max(1, tokens // length)], rows[held_out])
