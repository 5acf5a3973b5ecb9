"""Logits that stay on a card: what comes over, and that it is what numpy says of the whole row."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from petal.kernels.cuda import scores
from petal.kernels.cuda.scores import CardScores
from petal.protocol.wire.sampling import SamplingError, SamplingParams, TokenCounts, draw


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each transfer; on a machine without a card tensors stay where they are."""
    found: list[int] = []

    def on_host(rows: torch.Tensor) -> torch.Tensor:
        found.append(rows.nbytes)
        return rows.cpu()

    monkeypatch.setattr(scores, "on_host", on_host)
    return found


def logits(rows: int = 5, vocab: int = 3000) -> torch.Tensor:
    """Several are the largest of their row."""
    return (4 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))).clamp(max=8).bfloat16()


def test_a_greedy_draw_moves_two_numbers_a_row(moved: list[int]) -> None:
    rows = logits()
    found, whole = CardScores(rows), rows.float().numpy()
    tied = whole == whole.max(1, keepdims=True)
    assert tied.sum() > len(whole), "no ties, where the lower id must win"
    for row, expected in zip(found, whole, strict=True):
        assert draw(row, SamplingParams(), 3, TokenCounts()) == draw(expected, SamplingParams(), 3, TokenCounts())
    assert moved == [5 * 16]


@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=0.7, top_p=0.9, seed=3), SamplingParams(repetition_penalty=1.2)],
    ids=["sampled", "penalized"],
)
@pytest.mark.parametrize("at_once", [True, False])
def test_other_draws_are_those_of_the_row(
    params: SamplingParams, at_once: bool, moved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = logits()
    monkeypatch.setattr(scores, "AT_ONCE", rows.nbytes if at_once else rows.nbytes - 1)
    found, counts = CardScores(rows), TokenCounts([1, 2, 3], [4, 5])
    for index in (4, 1):
        assert draw(found[index], params, 9, counts) == draw(rows[index].float().numpy(), params, 9, counts)
    assert moved == ([rows.nbytes] if at_once else [rows[0].nbytes] * 2)
    assert found[2].tobytes() == rows[2].float().numpy().tobytes()
    assert np.array_equal(found[2].astype(np.float64), rows[2].double().numpy())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_useless_logits_are_told(value: float, moved: list[int]) -> None:
    rows = logits()
    rows[1, 77] = value
    with pytest.raises(SamplingError):
        draw(CardScores(rows)[1], SamplingParams(), 0, TokenCounts())
    assert draw(CardScores(rows)[0], SamplingParams(), 0, TokenCounts()) == int(rows[0].float().argmax())


@pytest.mark.cuda
def test_the_card_finds_the_first_of_equals() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    rows = logits(64, 128256)
    found = CardScores(rows.cuda())
    assert [row.argmax() for row in found] == rows.float().numpy().argmax(1).tolist()
    assert found[3].tobytes() == rows[3].float().numpy().tobytes()
