"""A model's blocks on a card say what they say on the CPU, as far as bfloat16 goes, and say it the same way twice."""

from __future__ import annotations

import functools
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.cuda
FORMATS = ("none", "int4", "nf4", "int8")


@pytest.fixture(scope="module", autouse=True)
def card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


@functools.cache
def llama() -> Path:
    """Heads of 32 values and rows of 128: blocks that the card computes whole."""
    folder = Path(tempfile.mkdtemp(prefix="petal-card-"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.12,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logits(device: str, quant: str, cuts: tuple[int, ...]) -> torch.Tensor:
    from petal.kernels.registry import backend_for
    from petal.peer.model import load_span, precision_of
    from petal.protocol.checkpoint.open import open_checkpoint

    from tests.support.families import served_logits

    with open_checkpoint(llama()) as checkpoint, torch.inference_mode():
        precision = precision_of(checkpoint, quant, "bf16")
        backend = backend_for(device)
        spans = [
            load_span(checkpoint, start, end, precision=precision, backend=backend) for start, end in pairwise(cuts)
        ]
        assert all(span.ragged and span.fused for span in spans), "a span runs otherwise than it should"
        if device == "cuda" and quant != "int8":  # whose matrices have outlier columns of their own
            assert all(span.fused and span.fused.whole for span in spans), "blocks are not computed whole"
        return served_logits(spans).float().cpu()


@pytest.mark.parametrize("quant", FORMATS)
def test_logits_are_those_of_the_cpu(quant):
    on_card, on_cpu = logits("cuda", quant, (0, 4)), logits("cpu", quant, (0, 4))
    assert float((on_card - on_cpu).norm() / on_cpu.norm()) < 3e-2
    chosen = on_cpu.topk(2).values
    sure = chosen[:, 0] - chosen[:, 1] > 0.1 * on_cpu.std()
    assert sure.float().mean() > 0.5
    assert torch.equal(on_card.argmax(1)[sure], on_cpu.argmax(1)[sure])


def test_a_split_changes_no_bit():
    assert torch.equal(logits("cuda", "int4", (0, 1, 3, 4)), logits("cuda", "int4", (0, 4)))
