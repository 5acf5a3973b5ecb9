"""`petal quantize`: a model's blocks one by one, each against what the blocks before it, quantized, make of a text."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.layout import CheckpointError
from ...protocol.checkpoint.open import open_checkpoint
from ..model import load_ends
from ..model.ends import Ends
from ..model.trainable_block import TrainableBlock
from .block_work import quantize_block, through
from .folder import Folder, unquantized
from .method import Method
from .methods import method_for
from .texts import Rows, read_rows

# Rows whose logits exist at a time.
_LOGIT_ROWS = 512


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    model: str
    format: str
    calibration: Path
    out: Path
    device: str
    tokens: int
    length: int
    seed: int


def quantize(options: Options, console: Console) -> None:
    """Write a quantized checkpoint, or go on where a killed run stopped. Raises CheckpointError."""
    with open_checkpoint(options.model) as checkpoint:
        if "quantization_config" in checkpoint.config:
            raise CheckpointError(f"{checkpoint.name} is quantized already: give the model that it was made from.")
        method = method_for(options.format, options.seed)
        rows = read_rows(options.calibration, checkpoint.tokenizer(), options.length, options.tokens)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[news]}"), console=console) as progress:
            _Run(options, checkpoint, method, rows, progress).run()


class _Run:
    def __init__(
        self, options: Options, checkpoint: Checkpoint, method: Method, rows: Rows, progress: Progress
    ) -> None:
        self._options, self._checkpoint, self._method, self._rows = options, checkpoint, method, rows
        self._progress = progress
        self._folder = Folder(options.out, checkpoint.n_blocks)
        self._ends: Ends = load_ends(checkpoint)

    def run(self) -> None:
        torch.manual_seed(self._options.seed)
        self._folder.claim(self._settings())
        first, hidden = self._folder.state()
        if not hidden:
            hidden = self._embedded()
            self._folder.save_state(0, hidden)
        task = self._progress.add_task("blocks", total=self._checkpoint.n_blocks, completed=first, news="")
        for index in range(first, self._checkpoint.n_blocks):
            hidden = self._block(index, hidden, task)
            self._folder.save_state(index + 1, hidden)
            self._progress.advance(task)
        self._finish(hidden)

    def _settings(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one that it goes on with."""
        settings = {key: str(value) for key, value in asdict(self._options).items() if key not in ("out", "device")}
        return {**settings, "digest": self._checkpoint.digest()}

    def _embedded(self) -> dict[str, Tensor]:
        """What enters block 0: for the quantized and for the exact model, the fitted rows and the held-out ones."""
        fitted, held_out = (
            torch.stack([self._ends.embed(row, torch.arange(len(row))) for row in ids]).clone()
            for ids in (self._rows.fitted, self._rows.held_out)
        )
        return {"fitted": fitted, "exact": fitted.clone(), "before": held_out, "after": held_out.clone()}

    def _block(self, index: int, hidden: dict[str, Tensor], task: Any) -> dict[str, Tensor]:
        """Quantize a block and write it; what leaves it."""
        block = TrainableBlock(self._checkpoint, index, torch.device(self._options.device))
        exact, before = (through(block, hidden[name]) for name in ("exact", "before"))
        result = quantize_block(
            block, self._method, hidden["fitted"], exact, lambda path: self._progress.update(task, news=path)
        )
        kept = unquantized(self._checkpoint, index, result.errors)
        self._folder.save_block(index, {**kept, **result.tensors}, result.errors)
        for path, error in result.errors.items():
            self._progress.console.print(f"{path}  relative error {error:.4f}", highlight=False)
        return {
            "fitted": through(block, hidden["fitted"]),
            "exact": exact,
            "before": before,
            "after": through(block, hidden["after"]),
        }

    def _finish(self, hidden: dict[str, Tensor]) -> None:
        before, after = (self._perplexity(hidden[name]) for name in ("before", "after"))
        errors = self._folder.errors()
        figures = {"perplexity_before": before, "perplexity_after": after, "relative_errors": errors}
        tokenizer = self._checkpoint.tokenizer().files()
        self._folder.finish(
            self._checkpoint, self._method.config, {**tokenizer, "figures.json": json.dumps(figures, indent=1) + "\n"}
        )
        self._progress.console.print(
            f"Perplexity of {self._rows.held_out.numel()} held-out tokens: {before:.3f} before, {after:.3f} after. "
            f"{len(errors)} linears, mean relative error {sum(errors.values()) / len(errors):.4f}.\n"
            f"{self._checkpoint.name} as {self._options.format} is in {self._options.out}",
            highlight=False,
        )

    def _perplexity(self, hidden: Tensor) -> float:
        """Of the held-out rows, by what leaves the last block."""
        states, ids = hidden[:, :-1].flatten(0, 1), self._rows.held_out[:, 1:].flatten()
        loss = sum(
            float(F.cross_entropy(self._ends.logits(rows), known, reduction="sum"))
            for rows, known in zip(states.split(_LOGIT_ROWS), ids.split(_LOGIT_ROWS), strict=True)
        )
        return math.exp(loss / len(ids))
