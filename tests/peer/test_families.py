"""Families are served without code of their own: logits beside transformers' own, and refusals by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from petal.peer.model import Span

from ..support import families
from ..support.families import CACHED, RAGGED, REFUSED, TABLE, try_family
from ..support.family_configs import FAMILIES

QUICK = {
    RAGGED: """
        llama mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 gpt_neox starcoder2 granite cohere glm4
        olmo2 stablelm gpt_oss exaone4 smollm3 gpt2 opt deepseek_v3
    """,
    CACHED: "bloom falcon gptj mpt diffllama roberta",
    REFUSED: "lfm2 mamba roformer",
}
QUICK_FAMILIES = {family: served for served, names in QUICK.items() for family in names.split()}
WRITTEN = f"Families of transformers {transformers.__version__}:"
other_version = pytest.mark.skipif(
    not TABLE.read_text().startswith(WRITTEN), reason="the table was written with another version of transformers"
)

QUICK_VARIANTS = {
    "falcon with alibi": CACHED,
    "falcon with grouped heads": CACHED,
    "gemma4_text with its own caches": RAGGED,
    "gpt2 with scaled layers": RAGGED,
    "phi3 with two ropes": CACHED,  # one forward has one rope, by its longest row
}


def rows() -> dict[str, tuple[str, str]]:
    """The committed table: family -> (served, note)."""
    lines = [line.strip("| \n").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {line[0]: (line[1].strip(), line[2] if len(line) > 2 else "") for line in lines[1:]}


@other_version
def test_the_table_lists_every_family_of_transformers():
    assert sorted(rows()) == FAMILIES


@other_version
def test_the_table_agrees_with_the_quick_families():
    listed = {family: served for family, (served, _) in rows().items()}
    assert {family: listed[family] for family in QUICK_FAMILIES} == QUICK_FAMILIES


@pytest.mark.parametrize(("family", "served"), [*QUICK_FAMILIES.items(), *QUICK_VARIANTS.items()])
def test_family(family: str, served: str):
    verdict = try_family(family)
    assert verdict.served == served, verdict.note
    assert served != REFUSED or "cannot be served" in verdict.note


@pytest.mark.full
@other_version
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_holds(family: str):
    verdict = try_family(family)
    assert (verdict.served, verdict.note) == rows()[family]


def test_a_wrong_tree_shows(monkeypatch: pytest.MonkeyPatch):
    """Negative control: rows that see a sibling for their parent must be noticed, in both ways to run."""
    served = families.served_logits

    def with_wrong_parent(spans: list[Span]) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(families, "TREE", (-1, 0, 0, 2, 1, 2, 5, 3))
            return served(spans)

    monkeypatch.setattr(families, "served_logits", with_wrong_parent)
    for family in ("llama", "bloom"):
        with pytest.raises(AssertionError, match="logits differ"):
            try_family(family)
