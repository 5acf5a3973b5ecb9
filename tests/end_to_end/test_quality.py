"""The quality bench on a model of seconds: the order of formats that everyone knows, and figures that add up."""

from __future__ import annotations

import json
import sys

import gguf
import pytest
import torch
from petal.kernels.formats.registry import FORMATS

from ..bench import quality
from ..bench.quality import Quality, bars
from ..support.k_quants import encode


@pytest.mark.parametrize("name", ["q4_k", "q5_k", "q6_k"])
def test_k_quants_are_the_bytes_that_the_public_package_reads(name):
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[0, :32] = 0
    blocks, format = encode(name, weight), FORMATS[name]
    ours = format.dequantize({"blocks": blocks}, (6, 512)).float()
    theirs = gguf.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[name.upper()])
    torch.testing.assert_close(ours, torch.from_numpy(theirs))
    assert (ours - weight).norm() / weight.norm() < {"q4_k": 0.09, "q5_k": 0.045, "q6_k": 0.022}[name]


@pytest.mark.parametrize(
    ("steps", "tokens", "text_bytes"), [(8, 1024, 3000), pytest.param(20, 2048, 6000, marks=pytest.mark.full)]
)
def test_formats_in_the_order_of_their_bits(monkeypatch, capsys, tmp_path, steps, tokens, text_bytes):
    formats = ["int8", "q6_k", "q5_k", "q4_k", "nf4", "int4 g64 nearest", "int4"]
    small = ["--width", "256", "--blocks", "1", "--steps", str(steps), "--tokens", str(tokens)]
    small += ["--length", "256"]
    (tmp_path / "short.txt").write_bytes(quality.EVALUATION.read_bytes()[:text_bytes])
    monkeypatch.setattr(quality, "EVALUATION", tmp_path / "short.txt")
    work = ["--work", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["quality", "--json", "--unquantized", *small, *work, "--formats", *formats])
    quality.main()
    report = json.loads(capsys.readouterr().out)
    rows = {row["format"]: row for row in report["rows"]}
    assert set(rows) == {"fp32", *formats}
    assert rows["fp32"]["mean_kl"] == 0
    assert rows["fp32"]["agreement"] == 1
    kl = {name: row["mean_kl"] for name, row in rows.items()}
    assert 0 < kl["q6_k"] < kl["q5_k"] < kl["q4_k"]
    assert kl["int8"] < kl["q5_k"]
    assert kl["int4"] < 0.7 * kl["int4 g64 nearest"]
    bits = {name: 8 * row["bytes_per_weight"] for name, row in rows.items()}
    assert bits["q4_k"] == 4.5
    assert bits["int4"] == bits["int4 g64 nearest"] == pytest.approx(4 + 24 / 64, abs=1e-3)
    assert {bar["format"] for bar in report["bars"]} == {"int4 g64 nearest", "nf4", "q6_k", "q4_k"}


def test_a_bar_can_be_missed():
    def row(format: str, kl: float) -> Quality:
        return Quality(format, 0.5, 10.0, kl, kl, 0.9, 0.0)

    rows = {row.format: row for row in (row("fp32", 0), row("int4 g64 nearest", 0.2), row("int4", 0.11))}
    assert [bar["kept"] for bar in bars(rows, unquantized=False)] == [False]
    rows["int4"] = row("int4", 0.1)
    assert [bar["kept"] for bar in bars(rows, unquantized=False)] == [True]
