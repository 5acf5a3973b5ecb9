"""Families are served without code of their own: logits beside transformers' own, and refusals by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from petal.peer.model import Span, load_ends, load_span
from petal.protocol.checkpoint.open import open_checkpoint

from ..support import families
from ..support.families import CACHED, RAGGED, TABLE, save_tiny, try_family
from ..support.family_configs import FAMILIES

# Whatever the version of transformers: served, or refused in a sentence. Which way is in the version's own table.
SERVED = """
    llama mistral mixtral qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 gpt_neox starcoder2 granite cohere glm4 olmo2
    stablelm gpt_oss exaone4 smollm3 gpt2 opt deepseek_v3 bloom falcon gptj mpt diffllama roberta
"""
SERVED_VARIANTS = {
    "falcon with alibi": CACHED,
    "falcon with grouped heads": CACHED,
    "gemma4_text with its own caches": RAGGED,
    "gpt2 with scaled layers": RAGGED,
    "llama4_text with a span without ropes": CACHED,  # it scales by a row's place in the forward
    "opt that embeds in half its width": RAGGED,
    "phi3 with two ropes": RAGGED,
}
OTHERS = ("lfm2", "mamba", "roformer")  # refused today
known_version = pytest.mark.skipif(not TABLE.exists(), reason=f"no table of transformers {transformers.__version__}")


def rows() -> dict[str, tuple[str, str]]:
    """The committed table: family -> (served, note)."""
    lines = [line.strip("| \n").split(" | ") for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    return {line[0]: (line[1].strip(), line[2] if len(line) > 2 else "") for line in lines[1:]}


@known_version
def test_the_table_lists_every_family_of_transformers():
    assert sorted(rows()) == FAMILIES


@pytest.mark.parametrize("family", [*SERVED.split(), *SERVED_VARIANTS])
def test_family(family: str):
    verdict = try_family(family)
    assert verdict.served in (RAGGED, CACHED), verdict.note
    if TABLE.exists():
        expected = SERVED_VARIANTS[family] if family in SERVED_VARIANTS else rows()[family][0]
        assert verdict.served == expected


@pytest.mark.parametrize("family", OTHERS)
def test_a_family_that_may_be_refused(family: str):
    """Served with the right logits, which `try_family` holds, or refused by name."""
    verdict = try_family(family)
    assert verdict.served in (RAGGED, CACHED) or re.fullmatch(r"\w+ cannot be served: [^\n]+\.", verdict.note), verdict
    if TABLE.exists():
        assert (verdict.served, verdict.note) == rows()[family]


@pytest.mark.full
@known_version
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_holds(family: str):
    verdict = try_family(family)
    assert (verdict.served, verdict.note) == rows()[family]


def test_one_peer_holds_a_model_that_embeds_in_another_width(tmp_path: Path):
    """As OPT-350M: what enters the blocks is no embedding, also where both ends are on one machine."""
    save_tiny("opt that embeds in half its width", tmp_path / "opt")
    with open_checkpoint(tmp_path / "opt", tmp_path / "digests") as checkpoint:
        whole, ends = load_span(checkpoint, 0, 4), load_ends(checkpoint)
    with torch.inference_mode():
        expected = families.expected_logits(families.reference(tmp_path / "opt"))
    found = families.served_logits([whole])
    assert (found - expected).abs().max() <= families.TOLERANCE * expected.abs().max()
    hidden = ends.embed(torch.tensor([3, 4]), torch.tensor([0, 1]))
    assert hidden.shape == (2, whole.hidden_size)
    assert ends.logits(hidden).shape == (2, whole.vocab_size)


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
