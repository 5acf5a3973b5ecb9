"""`petal distill`: sample what the target says, train a drafter on it, write it down. Each stage outlives a kill."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import LlamaForCausalLM

from ...peer.model import read_dense
from ...protocol.checkpoint.checkpoint import Checkpoint
from ...protocol.checkpoint.open import open_checkpoint
from ...protocol.wire.sampling import SamplingParams
from ..drafting.registry import load_drafter
from . import dialogues
from .corpus import Corpus
from .device import Scale, best_device, free_bytes, scale_for
from .product import save_card, save_folder, save_gguf
from .rounds import tokens_a_round
from .shape import DistillError, shape_for
from .student import new_student
from .swarm_target import SwarmTarget
from .target import LocalTarget, row_bytes, target_dtype
from .texts import Texts, joined, texts_of
from .train import Recipe, Trainer
from .turns import turns_of
from .world import World, together

# Of the time, for sampling; what is sampled is read several times.
_SAMPLING = 0.25
_REPORTS = 5
_BUDGETS = (8, 32)
_SETTINGS = {"t0": SamplingParams(), "t1": SamplingParams(temperature=1.0)}
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings")


@dataclass(frozen=True)
class Options:
    """What the command line says. `head` is the share of the vocabulary that the LM head computes."""

    target: str
    out: Path
    size: int = 16_000_000
    minutes: float = 20.0
    data: Path | None = None
    gguf: Path | None = None
    head: float = 1.0
    initial_peers: tuple[str, ...] = ()
    seed: int = 0


def distill(options: Options) -> None:
    """Make a drafter, or go on where an interrupted run stopped. Raises DistillError, CheckpointError, PeerError."""
    if (options.out / "model.safetensors").exists():
        raise DistillError(f"{options.out} holds a finished model: give another --out.")
    if options.data and options.initial_peers:
        raise DistillError("a swarm teaches by its own dialogues: leave out --data, or give a target at hand.")
    kind, count = best_device()
    with open_checkpoint(options.target) as checkpoint:
        plan = _plan(checkpoint, options, kind)  # refuses what cannot work before any process starts
        if not options.data:
            turns_of(checkpoint.tokenizer(), checkpoint.name)
    together(_work, 1 if options.initial_peers else count, kind, options, plan)


def _plan(checkpoint: Checkpoint, options: Options, kind: str) -> Scale:
    vocab = checkpoint.info(checkpoint.layout.token_matrix).shape[0]
    dtype = target_dtype(kind)
    values = sum(torch.Size(info.shape).numel() for info in checkpoint.tensors.values())
    held = 0 if options.initial_peers else values * dtype.itemsize
    return scale_for(kind, shape_for(options.size, vocab), held, row_bytes(checkpoint, dtype), free_bytes(kind))


def _work(world: World, options: Options, scale: Scale) -> None:
    with open_checkpoint(options.target) as checkpoint, _shown(world) as progress:
        _Distillation(world, options, scale, checkpoint, progress).run()


@contextmanager
def _shown(world: World) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[news]}"))
    with Progress(*columns, console=Console(stderr=True), disable=not world.leads) as progress:
        yield progress


class _Distillation:
    """One process's part of a run; the leader also measures and writes."""

    def __init__(
        self, world: World, options: Options, scale: Scale, checkpoint: Checkpoint, progress: Progress
    ) -> None:
        self._world, self._options, self._scale = world, options, scale
        self._checkpoint, self._progress = checkpoint, progress
        self._tokenizer = checkpoint.tokenizer()
        self._folder = options.out / "unfinished"
        self._seconds = options.minutes * 60
        if options.initial_peers:
            self._target: LocalTarget | SwarmTarget = SwarmTarget(options.target, options.initial_peers, world.device)
        else:
            self._target = LocalTarget(checkpoint, world.device)

    def run(self) -> None:
        """All stages."""
        self._claim()
        corpus = Corpus(self._texts(), self._options.seed)
        self._world.wait()
        trainer = self._trainer(corpus)
        probes = self._probes(corpus.held_out) if self._world.leads else {}
        figures = self._train(trainer, probes)
        if self._world.leads:
            self._finish(trainer, figures)

    def _claim(self) -> None:
        """Refuse to mix with an unfinished run of other settings."""
        settings = {**asdict(self._options), "digest": self._checkpoint.digest(), "processes": self._world.size}
        settings = {key: str(value) for key, value in settings.items() if key not in ("out", "gguf", "minutes", "head")}
        path = self._folder / "settings.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            raise DistillError(f"{self._options.out} holds an unfinished run of other settings: give another --out.")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._world.wait()
        if self._world.leads:
            path.write_text(json.dumps(settings))

    def _texts(self) -> Texts:
        """What to learn from: the given text, or dialogues for the first part of the time."""
        if self._options.data:
            return texts_of(self._options.data, self._tokenizer, self._scale.length)
        parts: list[Texts] = []
        spent = 0.0
        budget = _SAMPLING * self._seconds
        task = self._progress.add_task("sampling", total=budget, news="")
        while not parts or spent < budget:
            path = self._folder / f"dialogues-{self._world.rank}-{len(parts):04d}.safetensors"
            if not path.exists():
                began = time.monotonic()
                texts = self._sample(len(parts))
                texts.save(path, time.monotonic() - began)
            texts, seconds = Texts.load(path)
            parts.append(texts)
            spent += seconds
            tokens = sum(part.ids.numel() for part in parts)
            self._progress.update(task, completed=spent, news=f"{tokens / 1e6:.1f}M tokens")
        return joined(parts)

    def _sample(self, part: int) -> Texts:
        turns = turns_of(self._tokenizer, self._checkpoint.name)
        seed = (self._options.seed << 32) + (self._world.rank << 16) + part
        rows, length = self._scale.sampled, self._scale.length
        if isinstance(self._target, SwarmTarget):
            return self._target.sample(turns, rows, length, seed)
        return dialogues.sample(self._target, turns, rows, length, seed)

    def _trainer(self, corpus: Corpus) -> Trainer:
        matrix = read_dense(self._checkpoint, self._checkpoint.layout.token_matrix)
        config = self._checkpoint.config
        special = {key: config[key] for key in _SPECIAL if isinstance(config.get(key), int)}
        shape = shape_for(self._options.size, len(matrix))
        student = new_student(shape, matrix.to(self._world.device), special, self._options.seed)
        self._world.share(list(student.parameters()))
        recipe = Recipe(rows=self._scale.trained, chunk=self._scale.chunk)
        trainer = Trainer(student, self._target, corpus, recipe, self._world)
        if self._state.exists():
            trainer.load(self._state)
        return trainer

    @property
    def _state(self) -> Path:
        return self._folder / "state.pt"

    def _probes(self, held_out: Texts) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
        """Prompts of held-out texts with the target's own answers, by sampling settings."""
        prompts: list[list[int]] = []
        for ids, own in zip(held_out.ids.tolist(), held_out.own.tolist(), strict=True):
            start = own.index(True) or len(ids) // 4
            if start < len(ids) // 2 and len(prompts) < self._scale.probes:
                prompts.append(ids[:start])
        if not prompts:
            return {}
        answers = {}
        for name, params in _SETTINGS.items():
            if isinstance(self._target, SwarmTarget):
                known = self._target.answers(prompts, self._scale.probe_tokens, params)
            else:
                known = dialogues.answers(self._target, prompts, self._scale.probe_tokens, params)
            answers[name] = (prompts, known)
        return answers

    def _train(self, trainer: Trainer, probes: dict[str, Any]) -> dict[str, float]:
        seconds = self._seconds if self._options.data else (1 - _SAMPLING) * self._seconds
        task = self._progress.add_task("training", total=seconds, news="")
        figures: dict[str, float] = {}

        def report(trainer: Trainer, loss: float) -> None:
            if not self._world.leads:
                return
            figures.update(self._measure(trainer, probes))
            trainer.save(self._state)
            news = "  ".join(f"{name} {value:.3f}" for name, value in {"loss": loss, **figures}.items())
            self._progress.update(task, completed=trainer.elapsed, news=f"step {trainer.step}")
            self._progress.console.print(f"[dim]step {trainer.step}[/dim]  {news}", highlight=False)

        if trainer.elapsed >= seconds and self._world.leads:  # killed while the product was written
            report(trainer, 0.0)
        trainer.run(seconds, seconds / _REPORTS, report)
        return figures

    def _measure(self, trainer: Trainer, probes: dict[str, Any]) -> dict[str, float]:
        """Agreement, and tokens a round by budget and settings, as clients would draft with it."""
        figures = asdict(trainer.measure())
        save_folder(self._folder / "probe", trainer.student, self._tokenizer, None)
        drafter = load_drafter(str(self._folder / "probe"), self._tokenizer)
        for name, (prompts, known) in probes.items():
            for budget in _BUDGETS:
                gain = tokens_a_round(drafter, prompts, known, budget, _SETTINGS[name])
                figures[f"tokens_per_round_k{budget}_{name}"] = gain
        return figures

    def _finish(self, trainer: Trainer, figures: dict[str, float]) -> None:
        out, student = self._options.out, trainer.student
        save_folder(out, student, self._tokenizer, self._kept(trainer.corpus, student))
        texts = f"the text of {self._options.data.name}" if self._options.data else "dialogues that it wrote itself"
        story = (
            f"{trainer.step} steps of {trainer.recipe.rows} rows of {self._scale.length} tokens from {texts}, in "
            f"{self._options.minutes:g} minutes on {_machine(self._world)}. The loss is KL divergence plus total "
            "variation from the target's distribution."
        )
        save_card(out, student, self._checkpoint.name, figures, story)
        if self._options.gguf:
            save_gguf(self._options.gguf, out)
        shutil.rmtree(self._folder)
        self._progress.console.print(f"A drafter for {self._checkpoint.name} is in {out}", highlight=False)

    def _kept(self, corpus: Corpus, student: LlamaForCausalLM) -> Tensor | None:
        """The most frequent tokens of the texts."""
        if self._options.head >= 1:
            return None
        vocab = student.config.vocab_size
        likely = corpus.counts(vocab).argsort(descending=True, stable=True)
        return likely[: max(1, int(self._options.head * vocab))].sort().values


def _machine(world: World) -> str:
    if world.device.type != "cuda":
        return "a CPU"
    return f"{world.size} x {torch.cuda.get_device_name(world.device)}"
