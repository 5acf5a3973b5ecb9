"""Drafting over long links: `python -m tests.bench.speculation --json`, `--quick` for the cells that have bars.

SmolLM2 over three peer processes, each behind an emulated link. The contenders answer the same prompts in turn: plain
steps, n-grams of the text itself, the draft model, both merged, and (T = 1) the draft model with noise of its own
instead of the target's. All must say the same tokens. Ratios are of total tokens by total seconds.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import NamedTuple

from petal.client.drafting.drafter import Drafter, ScoredTree
from petal.client.drafting.registry import load_drafter
from petal.client.swarm import SwarmModel
from petal.protocol.wire.sampling import SamplingParams

from tests.support.reference import PROMPTS, demo_checkpoint

from .swarm import EmulatedLink, console, peer_processes, report

DELAYS_MS = (1.0, 12.5, 40.0)
MBITS = (100.0, 20.0)
TEMPERATURES = (0.0, 1.0)
DTYPES = {"bf16": ("bf16", "bf16"), "f32": ("float32", "float32")}  # weights, codec
CONTENDERS = {"plain": "none", "ngram": "ngram", "model": "model", "merged": "ngram,model"}


class Cell(NamedTuple):
    dtype: str
    delay_ms: float
    mbit: float
    temperature: float

    @property
    def name(self) -> str:
        return f"{int(self.delay_ms)}_{self.mbit:g}_t{self.temperature:g}"

    @property
    def full_name(self) -> str:
        return f"{self.dtype}_{self.name}"


WITH_BARS = [
    Cell(dtype, delay, 100.0, temperature)
    for dtype in DTYPES
    for delay, temperature in ((12.5, 0.0), (12.5, 1.0), (40.0, 0.0), (1.0, 0.0))
]
ALL = [Cell(d, ms, mbit, t) for d in DTYPES for ms in DELAYS_MS for mbit in MBITS for t in TEMPERATURES]


class OwnNoise(Drafter):
    """The negative control: a drafter whose noise is not the target's."""

    heavy = True

    def __init__(self, inner: Drafter) -> None:
        self._inner = inner

    def start(self, prompt: Sequence[int], sampling: SamplingParams) -> None:
        self._inner.start(prompt, replace(sampling, seed=sampling.seed + 1_000_003))

    def propose(self, ids: Sequence[int], budget: int, worth: float = 0.0) -> ScoredTree:
        tree = self._inner.propose(ids, budget, worth)
        self.level_s = self._inner.level_s
        return tree

    def ahead(self) -> bool:
        return self._inner.ahead()


@dataclass
class Score:
    """Sums over the prompts of one contender in one cell, without each answer's first token."""

    tokens: int = 0
    rounds: int = 0
    nodes: int = 0
    seconds: float = 0.0
    draft_s: float = 0.0
    bytes: int = 0
    by_kind: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def speed(self) -> float:
        return self.tokens / self.seconds


def measure(
    cell: Cell,
    address: str,
    links: Sequence[EmulatedLink],
    prompts: Sequence[dict],
    tokens: int,
    names: Sequence[str],
) -> dict[str, Score]:
    """Scores by contender; the contenders take turns at each prompt."""
    for link in links:
        link.order(f"delay {cell.delay_ms}")
        link.order(f"mbit {cell.mbit}")
    contenders: dict[str, str | Drafter] = {name: CONTENDERS[name] for name in names}
    if cell.temperature and "model" in names:
        tokenizer = demo_checkpoint().tokenizer()
        contenders["own noise"] = OwnNoise(load_drafter(shipped(), tokenizer))
    scores = {name: Score() for name in contenders}
    models = {
        name: SwarmModel.connect("demo", [address], codec=DTYPES[cell.dtype][1], wait_s=30) for name in contenders
    }
    for prompt in prompts:
        answers = set()
        for name, drafter in contenders.items():
            answers.add(tuple(answer(models[name], prompt, drafter, cell.temperature, tokens, scores[name], links)))
        # In bf16 and float32 alike a row's bits do not depend on the rows beside it.
        if len(answers) > 1:
            raise SystemExit(f"{cell.full_name}, {prompt['id']}: drafting changed the tokens")
        console.print(f"[dim]{cell.full_name} {prompt['id']}[/dim]")
    for model in models.values():
        model.close()
    return scores


def answer(
    model: SwarmModel,
    prompt: dict,
    drafter: str | Drafter,
    temperature: float,
    tokens: int,
    score: Score,
    links: Sequence[EmulatedLink],
) -> Iterator[int]:
    ids = model.tokenizer.apply_chat_template([{"role": "user", "content": prompt["text"]}])
    settings = {"max_new_tokens": tokens + 1, "eos_token_id": -1, "temperature": temperature, "seed": 7}
    stream = model.stream(ids, drafter=drafter, **settings)
    yield from next(stream).ids
    before = sum(link.bytes() for link in links)
    pieces = list(stream)
    score.bytes += sum(link.bytes() for link in links) - before
    seconds = sum(piece.seconds for piece in pieces)
    said = [token for piece in pieces for token in piece.ids]
    score.tokens += len(said)
    score.rounds += len(pieces)
    score.nodes += sum(piece.nodes for piece in pieces)
    score.seconds += seconds
    score.draft_s += sum(piece.draft_s for piece in pieces)
    score.by_kind[prompt["kind"]].append(len(said) / seconds)
    yield from said


def shipped() -> str:
    from petal.client.drafting.registry import shipped_drafter

    found = shipped_drafter(bytes.fromhex(demo_checkpoint().digest()))
    assert found is not None
    return str(found)


def rows_of(cell: Cell, scores: dict[str, Score]) -> Iterator[tuple[str, ...]]:
    plain = scores["plain"]
    for name, score in scores.items():
        accepted = score.tokens - score.rounds
        kinds = " ".join(f"{kind} {median(speeds):.1f}" for kind, speeds in score.by_kind.items())
        yield (
            f"{cell.dtype} {cell.delay_ms:g} ms {cell.mbit:g} Mbit/s T={cell.temperature:g}" if name == "plain" else "",
            name,
            f"{score.speed:.2f}",
            f"{score.tokens / score.rounds:.2f}",
            f"{score.speed / plain.speed:.2f}",
            f"{score.bytes / score.tokens:.0f}",
            f"{score.nodes / accepted:.1f}" if accepted else "",
            f"{score.draft_s / score.seconds:.0%}",
            kinds,
        )


COLUMNS = ("cell", "drafter", "tok/s", "tokens/round", "ratio", "bytes/token", "nodes/accepted", "drafting", "by kind")


def figures_of(cell: Cell, scores: dict[str, Score]) -> dict[str, float]:
    merged = scores["merged"]
    figures = {
        f"{cell.dtype}_ratio_{cell.name}": merged.speed / scores["plain"].speed,
        f"{cell.dtype}_tokens_per_round_{cell.name}": merged.tokens / merged.rounds,
    }
    if "own noise" in scores:
        for name in ("model", "own noise"):
            score = scores[name]
            figures[f"{cell.dtype}_{name.replace(' ', '_')}_{cell.name}"] = score.tokens / score.rounds
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--quick", action="store_true", help="the cells that have bars, few prompts, two contenders")
    parser.add_argument("--cells", help="names such as bf16_12_100_t0, with commas between; by default all")
    parser.add_argument("--contenders", help=f"some of {','.join(CONTENDERS)}; plain and merged must be among them")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--tokens", type=int, default=128)
    options = parser.parse_args()
    names = options.contenders.split(",") if options.contenders else list(CONTENDERS)
    cells = ALL
    if options.quick:
        options.prompts, options.tokens, names, cells = 2, 24, ["plain", "merged"], WITH_BARS
    if options.cells:
        cells = [cell for cell in ALL if cell.full_name in options.cells.split(",")]
    prompts = PROMPTS[:: -(-len(PROMPTS) // options.prompts)]
    rows: list[tuple[str, ...]] = []
    figures: dict[str, float] = {}
    for dtype in dict.fromkeys(cell.dtype for cell in cells):
        with peer_processes(3, "--dtype", DTYPES[dtype][0], link_delay_ms=1.0) as (address, links):
            for cell in (cell for cell in cells if cell.dtype == dtype):
                scores = measure(cell, address, links, prompts, options.tokens, names)
                rows += rows_of(cell, scores)
                figures |= figures_of(cell, scores)
                console.print(json.dumps(figures), style="dim")
    report("Drafting over three peers", rows, COLUMNS, figures)


if __name__ == "__main__":
    main()
