"""Training against the target's whole distribution, for a given time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from .corpus import Corpus
from .device import compiled
from .loss import agreement, divergence
from .texts import Texts
from .world import World

# The rate rises for so many steps or this part of the time, whatever ends first.
_WARMUP_STEPS, _WARMUP_PART = 100, 0.05


class Target(Protocol):
    """Whom the drafter learns from."""

    def lessons(self, texts: Texts, rows: Tensor, chunk: int) -> Iterator[Callable[[Tensor], Tensor]]:
        """For each chunk of flat positions: the drafter's logits -> the target's, [chunk, vocab]."""


@dataclass(frozen=True)
class Recipe:
    """How to train; rates are peaks, `rows` are those of a step over all processes."""

    rows: int = 256
    chunk: int = 4096  # positions whose logits exist at a time
    matrix_rate: float = 4e-3
    table_rate: float = 3e-3
    weight_decay: float = 0.05
    tv_weight: float = 1.0


def _muon(matrices: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    """For matrices between hidden states; rates mean what they mean to AdamW (Moonlight, arXiv 2502.16982)."""
    return torch.optim.Muon(
        matrices, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )


@dataclass
class Agreement:
    """Of held-out positions: shares whose likeliest token is among the drafter's 1, 4, 8; mean total variation."""

    top1: float
    top4: float
    top8: float
    tv: float


class Trainer:
    """One drafter in training. All of its state but the texts lies in `save`'s file."""

    def __init__(self, student: LlamaForCausalLM, target: Target, corpus: Corpus, recipe: Recipe, world: World) -> None:
        self.student, self.corpus, self.recipe = student, corpus, recipe
        self._target, self._world = target, world
        self._rows = max(1, recipe.rows // world.size)
        self.step, self.elapsed = 0, 0.0
        self._body = compiled(student.model, world.device)
        self._loss = compiled(divergence, world.device)
        self._mixed = torch.autocast(world.device.type, torch.bfloat16, enabled=world.device.type == "cuda")
        matrices = [p for p in student.model.layers.parameters() if p.dim() == 2]
        others = [p for p in student.parameters() if not any(p is matrix for matrix in matrices)]
        self._optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (_muon(matrices, recipe), recipe.matrix_rate),
            (torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0), recipe.table_rate),
        ]

    def run(self, seconds: float, every: float, report: Callable[[Trainer, float], None]) -> None:
        """Train until `seconds` have been spent in all; `report` hears the mean loss every `every` seconds."""
        began, told, count = time.monotonic() - self.elapsed, self.elapsed, 0
        loss = torch.zeros((), device=self._world.device)
        while self.elapsed < seconds:
            self._set_rates(self.elapsed / seconds)
            loss += self._update(self.corpus.batch(self.step, self._rows).to(self._world.device))
            self.step, count = self.step + 1, count + 1
            self.elapsed = self._world.agree(time.monotonic() - began)
            if self.elapsed - told >= every or self.elapsed >= seconds:
                report(self, float(loss) / count)
                loss.zero_()
                told, count = self.elapsed, 0

    @torch.no_grad()
    def measure(self) -> Agreement:
        """On the held-out texts."""
        held_out, sums, count = self.corpus.held_out, torch.zeros(4, device=self._world.device), 0
        for start in range(0, len(held_out), self._rows):
            texts = held_out[start : start + self._rows].to(self._world.device)
            hidden, rows = self._forward(self.student.model, texts)
            parts = zip(hidden.split(self.recipe.chunk), self._lessons(texts, rows), strict=True)
            for part, lesson in parts:
                logits = self._logits(part)
                sums += agreement(logits, lesson(logits))
            count += len(rows)
        return Agreement(*(sums / count).tolist())

    def save(self, path: Path) -> None:
        """Write all state in one atomic step."""
        state = {
            "student": self.student.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self._optimizers],
            "step": self.step,
            "elapsed": self.elapsed,
        }
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def load(self, path: Path) -> None:
        """Go on where `save` stopped."""
        state: dict[str, Any] = torch.load(path, map_location=self._world.device, weights_only=True)
        self.student.load_state_dict(state["student"])
        for (optimizer, _), saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.elapsed = state["step"], state["elapsed"]

    def _set_rates(self, done: float) -> None:
        """Warm-up, then straight down to nothing at the end of the time."""
        factor = min(1.0, max((self.step + 1) / _WARMUP_STEPS, done / _WARMUP_PART)) * max(0.0, 1 - done)
        for optimizer, peak in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor

    def _update(self, texts: Texts) -> Tensor:
        """One step; the mean loss of a position."""
        hidden, rows = self._forward(self._body, texts)
        # Logits of all positions would not fit in memory: the head's part is done by chunks, then the body's at once.
        leaves = [piece.detach().requires_grad_() for piece in hidden.split(self.recipe.chunk)]
        total = torch.zeros((), device=self._world.device)
        for leaf, lesson in zip(leaves, self._lessons(texts, rows), strict=True):
            logits = self._logits(leaf)
            loss = self._loss(logits, lesson(logits), self.recipe.tv_weight) / len(rows)
            loss.backward()
            total += loss.detach()
        hidden.backward(torch.cat([leaf.grad for leaf in leaves if leaf.grad is not None]))
        self._world.mean_([p.grad for p in self.student.parameters() if p.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        for optimizer, _ in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return total

    def _forward(self, body: Callable[..., Any], texts: Texts) -> tuple[Tensor, Tensor]:
        """The drafter's hidden states [n, d] where the next token counts, and the flat positions of these."""
        rows = texts.own[:, 1:].flatten().nonzero()[:, 0]
        if len(rows) > self.recipe.chunk:  # equal chunks: another shape would have to be compiled
            rows = rows[: len(rows) // self.recipe.chunk * self.recipe.chunk]
        with self._mixed:
            hidden = body(input_ids=texts.ids.long(), use_cache=False).last_hidden_state
        return hidden[:, :-1].flatten(0, 1)[rows], rows

    def _lessons(self, texts: Texts, rows: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
        return self._target.lessons(texts, rows, self.recipe.chunk)

    def _logits(self, hidden: Tensor) -> Tensor:
        with self._mixed:
            return F.linear(hidden, self.student.lm_head.weight)
