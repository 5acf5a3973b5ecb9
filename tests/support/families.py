"""Which families can be served: a tiny random model of each, cut in three spans, beside transformers' own.

`python -m tests.support.families [FAMILY ...]` tries them and, where none is named, writes the table of this version of
transformers under tests/data/families.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from petal.peer.engine.kv_cache import KVCache
from petal.peer.engine.runner import ModelRunner, Segment
from petal.peer.model import Span, load_span
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.wire.tree import RowTree, StepTree, chain
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from .family_configs import BLOCKS, FAMILIES, VOCAB, tiny_config

TABLE = Path(__file__).parents[1] / "data" / "families" / f"{transformers.__version__}.md"
SPANS = ((0, 1), (1, 3), (3, BLOCKS))
PROMPT = 20
CHUNKS = (11, 1, 8)  # of the prompt; beyond the tiny windows of 8
TREE = (-1, 0, 0, 1, 1, 2, 5, 3)
TOLERANCE = 5e-4

RAGGED, CACHED, REFUSED, UNTRIED = "batched", "one by one", "refused", "no tiny model"


@dataclass(frozen=True)
class Verdict:
    """How a family fares. `error` is the largest difference of a logit, as a share of the largest logit."""

    served: str
    note: str = ""
    error: float = 0.0


def save_tiny(family: str, folder: Path) -> None:
    """A random model with weights large enough that what attention sees shows in the logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).eval().float()
    for parameter in model.parameters():
        if parameter.dim() > 1 and parameter.numel() < 1 << 20:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)


def try_family(family: str) -> Verdict:
    """Build, serve in three spans, and compare; raises AssertionError where logits differ."""
    with TemporaryDirectory(prefix="petal-family-") as name:
        folder = Path(name) / family
        # What a family's config or reference refuses is its own affair.
        try:
            save_tiny(family, folder)
            with torch.inference_mode():
                expected = expected_logits(reference(folder))
        except Exception as error:
            return Verdict(UNTRIED, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100].strip()}")
        try:
            with open_checkpoint(folder, Path(name) / "cache") as checkpoint:
                spans = [load_span(checkpoint, *span) for span in SPANS]
        except CheckpointError as error:
            return Verdict(REFUSED, str(error).replace(str(folder), family).splitlines()[0])
    ragged = {span.ragged for span in spans}
    found = served_logits(spans)
    error = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    assert error <= TOLERANCE, f"{family}: logits differ by {error:.1e} of the largest"
    return Verdict(RAGGED if ragged == {True} else CACHED, error=error)


def reference(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().float()


def token_ids() -> tuple[Tensor, Tensor]:
    """A prompt and the ids of a tree behind it."""
    noise = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB, (PROMPT,), generator=noise), torch.randint(3, VOCAB, (len(TREE),), generator=noise)


def paths() -> list[list[int]]:
    """Rows from the root to each row of the tree."""
    found: list[list[int]] = []
    for row, parent in enumerate(TREE):
        found.append([*(found[parent] if parent >= 0 else []), row])
    return found


def expected_logits(model: PreTrainedModel) -> Tensor:
    """transformers' logits of every prompt row, then of every tree row behind its own path: no cache, no tree."""
    prompt, tree = token_ids()
    whole = [torch.cat((prompt, tree[torch.tensor(path)])) for path in paths()]
    rows = [model(input_ids=ids[None], use_cache=False).logits[0, -1] for ids in whole]
    return torch.cat((model(input_ids=prompt[None], use_cache=False).logits[0], torch.stack(rows)))


def served_logits(spans: Sequence[Span]) -> Tensor:
    """The same rows as the peers compute them: a prompt in chunks, then the tree."""
    prompt, tree = (ids.to(spans[0].backend.device) for ids in token_ids())
    caches = [KVCache(span.backend, span.layers, 64) for span in spans]
    tables = [cache.open() for cache in caches]
    runners = [ModelRunner(span, cache) for span, cache in zip(spans, caches, strict=True)]

    def step(rows: Tensor, shape: StepTree) -> Tensor:
        for span, table, runner in zip(spans, tables, runners, strict=True):
            segment = Segment(table, rows, shape, range(span.start, span.end))
            rows = runner.run([segment])[0]
        return spans[-1].logits(rows)

    found = []
    for chunk in prompt.split(CHUNKS):
        found.append(step(chunk, chain(len(chunk))))
        for cache, table in zip(caches, tables, strict=True):
            cache.commit(table, range(len(chunk)))
    return torch.cat([*found, step(tree, RowTree(tuple(TREE)))])


def table(verdicts: dict[str, Verdict]) -> str:
    """The page of all families in Markdown."""
    counts = Counter(verdict.served for verdict in verdicts.values())
    total = ", ".join(f"{counts[served]} {served}" for served in (RAGGED, CACHED, REFUSED, UNTRIED))
    lines = [
        f"Families of transformers {transformers.__version__}: {total}.",
        "",
        "| family | served | |",
        "|---|---|---|",
    ]
    lines += [f"| {family} | {verdict.served} | {verdict.note} |" for family, verdict in verdicts.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    names = sys.argv[1:] or FAMILIES
    verdicts = {}
    for family in names:
        started = time.perf_counter()
        try:
            verdict = verdicts[family] = try_family(family)
        except Exception as error:  # a fault of ours; the others shall be tried too
            verdict = Verdict("FAULT", f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - started
        print(f"{family:26} {seconds:5.1f} s  {verdict.served:14} {verdict.error:.0e} {verdict.note}", flush=True)
    if names is FAMILIES:
        TABLE.write_text(table(verdicts))


if __name__ == "__main__":
    main()
