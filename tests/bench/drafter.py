"""How well a drafter knows its target: `python -m tests.bench.drafter --json [--drafter PATH] [--target PATH]`.

The target's answers to the 20 prompts, greedy and at T = 1 with seed 0, depend on nothing but the model: they are known
before, so trees are walked along them without running the target. Agreement is that of both models' distributions
wherever the target speaks in dialogues that it wrote by itself, with a seed that no training used. `level_ms` is one
forward of BEAMS nodes behind CONTEXT tokens, LM head included.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from petal.client.distill.dialogues import sample
from petal.client.distill.loss import agreement as agree
from petal.client.distill.target import LocalTarget
from petal.client.distill.texts import Texts
from petal.client.distill.turns import turns_of
from petal.client.drafting.model import BEAMS, DraftModel, ModelDrafter
from petal.client.drafting.registry import shipped_drafter
from petal.client.drafting.tree_cache import TreeCache
from petal.protocol.checkpoint.checkpoint import Checkpoint
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.wire.sampling import SamplingParams, TokenCounts, draw
from petal.protocol.wire.tree import walk
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from tests.support.reference import DATA, GREEDY, NEW_TOKENS, PROMPTS, greedy, load_reference

BUDGET = 32
CONTEXT, REPEATS = 256, 60
SETTINGS = {"t0": SamplingParams(), "t1": SamplingParams(temperature=1.0, seed=0)}
SAMPLED = DATA / "sampled.json"
DIALOGUES = DATA / "dialogues.json"
ROWS, LENGTH, SEED = 24, 400, 2**31 - 1


@dataclass(frozen=True)
class Answer:
    """A prompt and what the target says to it."""

    prompt: list[int]
    ids: list[int]


def answers(target: Checkpoint, model: PreTrainedModel) -> dict[str, list[Answer]]:
    """The target's answers by setting; the demo model's are stored."""
    tokenizer = target.tokenizer()
    prompts = {p["id"]: tokenizer.apply_chat_template([{"role": "user", "content": p["text"]}]) for p in PROMPTS}
    with open_checkpoint("demo") as demo:
        stored = target.digest() == demo.digest()
    if stored:
        said = {"t0": {name: e["ids"] for name, e in json.loads(GREEDY.read_text()).items()}}
        said["t1"] = json.loads(SAMPLED.read_text())
    else:
        said = {"t0": {name: greedy(model, ids)[0] for name, ids in prompts.items()}}
        said["t1"] = {name: sampled(model, ids, SETTINGS["t1"]) for name, ids in prompts.items()}
    return {key: [Answer(ids, by_name[name]) for name, ids in prompts.items()] for key, by_name in said.items()}


@torch.inference_mode()
def sampled(model: PreTrainedModel, prompt: list[int], params: SamplingParams) -> list[int]:
    """NEW_TOKENS tokens, drawn as a tail peer draws them; end of text ignored."""
    cache, fed, out = DynamicCache(), list(prompt), list[int]()
    while len(out) < NEW_TOKENS:
        logits = model(torch.tensor([fed]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        fed = [draw(logits.numpy(), params, len(prompt) + len(out), TokenCounts())]
        out += fed
    return out


def dialogues(target: Checkpoint) -> Texts:
    """Fresh dialogues of the target with itself; the demo model's are stored."""
    with open_checkpoint("demo") as demo:
        if target.digest() == demo.digest():
            stored = json.loads(DIALOGUES.read_text())
            return Texts(torch.tensor(stored["ids"]), torch.tensor(stored["own"], dtype=torch.bool))
    turns = turns_of(target.tokenizer(), target.name)
    return sample(LocalTarget(target, torch.device("cpu")), turns, ROWS, LENGTH, SEED)


@torch.inference_mode()
def agreement(target: PreTrainedModel, drafter: DraftModel, texts: Texts) -> dict[str, float]:
    """Shares of positions whose likeliest token is among the drafter's 1 and 4 likeliest; mean total variation."""
    sums = torch.zeros(4)
    for ids, own in zip(texts.ids.long(), texts.own, strict=True):
        rows = own[1:].nonzero()[:, 0]
        theirs = target(ids[None, :-1], logits_to_keep=rows).logits[0]
        mine = draft_logits(drafter, ids[:-1], rows)
        sums += agree(mine, theirs[:, : mine.shape[1]])
    top1, top4, _, tv = (sums / texts.own[:, 1:].sum()).tolist()
    return {"top1": top1, "top4": top4, "tv": tv}


def draft_logits(drafter: DraftModel, ids: Tensor, rows: Tensor) -> Tensor:
    """The draft model's logits [rows, vocab] behind these tokens of `ids`, by the kernels that drafting uses."""
    hidden = TreeCache(drafter.span).forward(ids.tolist(), range(-1, len(ids) - 1))
    return drafter.spread(drafter.logits(hidden[rows]))


def level_ms(drafter: DraftModel) -> float:
    """Median milliseconds of one level of a tree."""
    cache, ids = TreeCache(drafter.span), range(BEAMS)
    cache.forward(range(CONTEXT), range(-1, CONTEXT - 1))
    cache.commit(range(CONTEXT))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        drafter.logits(cache.forward(ids, [-1] * BEAMS))
        times.append(time.perf_counter() - began)
        cache.truncate(CONTEXT)
    return statistics.median(times) * 1e3


def rounds(drafter: ModelDrafter, answer: Answer, params: SamplingParams) -> Iterator[int]:
    """Tokens that each round brings: the accepted nodes of its tree and the one behind them."""
    drafter.start(answer.prompt, params)
    at = 1  # the first token comes with the prompt
    while at < len(answer.ids):
        tree = drafter.propose([*answer.prompt, *answer.ids[:at]], BUDGET)
        rest = answer.ids[at:]
        accepted, _ = walk(tree, lambda row, path, rest=rest: rest[len(path)] if len(path) < len(rest) else -1)
        gained = min(len(accepted), len(rest))
        at += gained
        yield gained


def measure(source: Path, target: str) -> dict[str, float]:
    """All figures."""
    checkpoint = open_checkpoint(target)
    reference = load_reference(checkpoint)
    model = DraftModel.load(str(source), checkpoint.tokenizer())
    known = answers(checkpoint, reference)
    figures = agreement(reference, model, dialogues(checkpoint))
    for key, params in SETTINGS.items():
        gains: list[int] = []
        for answer in known[key]:
            drafter = ModelDrafter(model)
            gains += rounds(drafter, answer, params)
        figures[f"tokens_per_round_k{BUDGET}_{key}"] = statistics.fmean(gains)
    files = source.rglob("*.safetensors") if source.is_dir() else [source]
    return {**figures, "level_ms": level_ms(model), "size_mb": sum(f.stat().st_size for f in files) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--target", default="demo", help="any checkpoint with a chat template")
    parser.add_argument("--drafter", type=Path, help="folder or GGUF file; by default the one that Petal has")
    options = parser.parse_args()
    with open_checkpoint(options.target) as checkpoint:
        source = options.drafter or shipped_drafter(bytes.fromhex(checkpoint.digest()))
    if source is None:
        parser.error(f"Petal has no drafter for {options.target}: give --drafter")
    figures = measure(source, options.target)
    table = Table("figure", "value", title=f"{source.name} for {options.target}")
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
    if options.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
