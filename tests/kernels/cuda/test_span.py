"""A model's blocks on a card say what they say on the CPU, as far as bfloat16 goes, and say it the same way twice."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

pytestmark = pytest.mark.cuda
FORMATS = ("none", "int4", "nf4", "int8", "q8_0")


@pytest.fixture(scope="module", autouse=True)
def card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")


def logits(device: str, quant: str, cuts: tuple[int, ...]) -> torch.Tensor:
    from petal.kernels.registry import backend_for
    from petal.peer.model import load_span, precision_of
    from petal.protocol.checkpoint.open import open_checkpoint

    from tests.support.families import served_logits
    from tests.support.tiny import tiny_llama

    with open_checkpoint(tiny_llama()) as checkpoint, torch.inference_mode():
        precision = precision_of(checkpoint, quant, "bf16")
        backend = backend_for(device)
        spans = [
            load_span(checkpoint, start, end, precision=precision, backend=backend) for start, end in pairwise(cuts)
        ]
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
