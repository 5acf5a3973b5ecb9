"""`petal quantize`: numbers first, then the command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from petal.kernels.formats import aqlm, int4, spqr
from petal.peer.model import load_span, precision_of, read_dense
from petal.peer.model.hooks import choose_attention
from petal.peer.model.quantized_checkpoint import storage_of
from petal.peer.model.trainable_block import TrainableBlock
from petal.peer.quantize import cli
from petal.peer.quantize.additive import Additive, fit_codebooks, fit_scales
from petal.peer.quantize.aqlm import AqlmMethod
from petal.peer.quantize.beam import search_codes
from petal.peer.quantize.covariance import Covariance, relative_error
from petal.peer.quantize.gptq import Feedback
from petal.peer.quantize.int4 import Int4Method
from petal.peer.quantize.int4_grid import Int4Grid
from petal.peer.quantize.run import Options, quantize
from petal.peer.quantize.spqr import SpqrMethod
from petal.peer.quantize.spqr_grid import leave_one_out
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.open import open_checkpoint
from rich.console import Console
from typer.testing import CliRunner

from ..support.byte_llama import new_llama, save, train
from ..support.tiny import tiny_llama

DATA = Path(__file__).parents[1] / "data"
CPU = torch.device("cpu")
SHAPE = (32, 128)
METHODS = {
    "int4": (Int4Method(), int4.Int4(64)),
    "spqr": (SpqrMethod(), spqr.Spqr()),
    "aqlm": (AqlmMethod(0), aqlm.Aqlm()),
}


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with a few large values, and the covariance of correlated inputs."""
    noise = torch.Generator().manual_seed(seed)
    weight = torch.randn(SHAPE, generator=noise) * 0.1
    weight[torch.rand(SHAPE, generator=noise) < 0.01] *= 8
    mix = torch.randn(SHAPE[1], SHAPE[1], generator=noise) * 0.1 + torch.diag(torch.rand(SHAPE[1], generator=noise))
    inputs = Covariance(SHAPE[1], CPU)
    inputs.add(torch.randn(4, 512, SHAPE[1], generator=noise) @ mix)
    return weight, inputs.mean()


def nearest(weight: torch.Tensor, levels: int, group: int) -> torch.Tensor:
    """Round to nearest on the range of each group."""
    groups = weight.view(len(weight), -1, group)
    low, high = groups.amin(2, True).clamp(max=0), groups.amax(2, True).clamp(min=0)
    scale = (high - low) / (levels - 1)
    zero = (-low / scale).round()
    return (((groups / scale + zero).round().clamp(0, levels - 1) - zero) * scale).view(weight.shape)


def test_covariance_and_relative_error():
    noise = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 16, generator=noise), torch.randn(8, 16, generator=noise)
    inputs = Covariance(16, CPU)
    inputs.add(x[:40])
    inputs.add(x[40:].view(2, 12, 16))
    torch.testing.assert_close(inputs.mean(), x.T @ x / 64)
    other = weight + 0.1
    expected = ((x @ (weight - other).T).norm() / (x @ weight.T).norm()).item()
    assert relative_error(weight, other, inputs.mean()) == pytest.approx(expected, rel=1e-4)
    assert relative_error(weight, other, torch.zeros(16, 16)) == 0.0


def test_feedback_beats_rounding_to_nearest_on_the_same_grid():
    weight, covariance = problem()
    feedback = Feedback.against(covariance, 64)
    fed = feedback.run(weight, Int4Grid(weight.shape, 64, feedback.cost))
    alone = Feedback.against(torch.eye(SHAPE[1]), 64)  # nothing to make good: inputs have nothing in common
    blind = alone.run(weight, Int4Grid(weight.shape, 64, alone.cost))
    assert relative_error(weight, fed, covariance) < 0.7 * relative_error(weight, blind, covariance)


def test_feedback_is_exact_where_the_grid_is():
    weight, covariance = problem()

    class Everything:
        def fit(self, columns, values):
            pass

        def round(self, column, values):
            return values

    torch.testing.assert_close(Feedback.against(covariance, 16).run(weight, Everything()), weight)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("format", METHODS)
def test_tensors_decode_to_what_was_fitted(format, dead, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    weight, covariance = (tensor.to(device) for tensor in problem())
    if dead:
        covariance = torch.zeros_like(covariance)
    method, layout = METHODS[format]
    parts = method.quantize(weight, covariance)
    tensors = {name: tensor.cpu() for name, tensor in parts.tensors().items()}
    decoded = layout.dequantize(tensors, SHAPE)
    torch.testing.assert_close(decoded.float(), parts.dense().cpu(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("format", "levels", "group"), [("int4", 16, 64), ("spqr", 16, 64), ("aqlm", 8, 64)], ids=METHODS
)
def test_less_error_than_rounding(format, levels, group):
    weight, covariance = problem()
    method, _ = METHODS[format]
    error = relative_error(weight, method.quantize(weight, covariance).dense(), covariance)
    assert error < 0.7 * relative_error(weight, nearest(weight, levels, group), covariance)


def test_leaving_out_the_odd_one_gains_most():
    values = torch.linspace(-1, 1, 16).repeat(2, 1)
    values[1, 5] = 20
    gains = leave_one_out(values, torch.ones(16))
    assert int(gains[1].argmax()) == 5
    assert gains[1, 5] > 10 * gains[0].max()


def test_spqr_keeps_outliers_exactly():
    weight, covariance = problem()
    weight[3, 40] = 5.0
    parts = SpqrMethod().quantize(weight, covariance)
    assert (3, 40) in set(zip(*(where.tolist() for where in parts.outliers), strict=True))
    assert len(parts.outliers[0]) < 0.06 * weight.numel()
    assert float(parts.dense()[3, 40]) == pytest.approx(float(weight[3, 40]), rel=5e-2)


def test_every_turn_of_aqlm_lowers_the_error():
    weight, covariance = problem()
    parts = Additive.start(weight, 2, 16, 8, torch.Generator().manual_seed(0))
    errors = [relative_error(weight, parts.dense(), covariance)]
    for _ in range(3):
        fit_scales(parts, weight, covariance)
        errors.append(relative_error(weight, parts.dense(), covariance))
        fit_codebooks(parts, weight, covariance, 20)
        errors.append(relative_error(weight, parts.dense(), covariance))
        search_codes(parts, weight, covariance, 4)
        errors.append(relative_error(weight, parts.dense(), covariance))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.8 * errors[0]


def test_beam_search_finds_what_trying_all_codes_finds():
    noise = torch.Generator().manual_seed(0)
    weight, books = torch.randn(6, 8, generator=noise), torch.randn(2, 16, 8, generator=noise)
    parts = Additive(torch.zeros(6, 1, 2, dtype=torch.long), books, torch.ones(6))
    search_codes(parts, weight, torch.eye(8), 16)
    sums = books[0][:, None] + books[1]
    best = ((weight[:, None, None] - sums) ** 2).sum(3).flatten(1).amin(1)
    torch.testing.assert_close(((weight - parts.dense()) ** 2).sum(1), best)


def test_a_plain_block_computes_what_a_peer_computes():
    with open_checkpoint(tiny_llama()) as checkpoint:
        block, span = TrainableBlock(checkpoint, 1, CPU), load_span(checkpoint, 1, 2)
    choose_attention(span.model, "eager")
    hidden = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(hidden), span.forward_cached(hidden, [])[0], rtol=1e-4, atol=1e-4)
    assert len(block.linears) == 7
    assert len(block.vectors) == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A byte-level Llama that has learned a little, and a text beside it."""
    folder = tmp_path_factory.mktemp("quantize")
    text = (DATA / "evaluation.txt").read_bytes()
    llama = new_llama(64, 3)
    train(llama, text, 60, "cpu", length=64, rows=8)
    save(llama, folder / "model")
    (folder / "text.txt").write_bytes(text[:12000])
    return folder / "model"


def options(model: Path, format: str, out: Path, **others) -> Options:
    text = others.pop("text", model.parent / "text.txt")
    return Options(str(model), format, text, out, "cpu", tokens=1024, length=64, seed=0)


def quantized(model: Path, format: str) -> Path:
    """The folder of the model in a format, made once."""
    folder = model.parent / format
    if not folder.exists():
        quantize(options(model, format, folder), Console(quiet=True))
    return folder


@pytest.fixture(scope="module", params=METHODS)
def checkpoint_of(request, model) -> tuple[str, Path]:
    """A format, and the folder of the model in it."""
    return request.param, quantized(model, request.param)


def test_a_quantized_checkpoint_holds_every_tensor_of_the_model(model, checkpoint_of):
    format, folder = checkpoint_of
    figures = json.loads((folder / "figures.json").read_text())
    assert len(figures["relative_errors"]) == 21
    assert all(0 < error < 0.3 for error in figures["relative_errors"].values())
    assert figures["perplexity_after"] < 1.05 * figures["perplexity_before"]
    assert not (folder / "unfinished").exists()
    with open_checkpoint(folder) as made, open_checkpoint(model) as checkpoint:
        assert made.tokenizer().encode("ab") == [97, 98]
        linears = set(figures["relative_errors"])
        dense = {name for name in checkpoint.tensors if name.removesuffix(".weight") not in linears}
        stored = {name for path in linears for name in made.tensors if name.startswith(f"{path}.")}
        assert set(made.tensors) == dense | stored
        assert made.config["quantization_config"]["quant_method"]
        storage, name = storage_of(made), "model.layers.1.mlp.up_proj.weight"
        assert storage.quant == format
        weight = read_dense(checkpoint, name)
        assert (storage.read(made, name, (192, 64)).dense() - weight).norm() < 0.5 * weight.norm()


def test_a_peer_serves_the_checkpoint(model, checkpoint_of):
    """A span with packed weights says what one says that decodes them first, up to bfloat16; another model differs."""
    format, folder = checkpoint_of
    ids = torch.tensor([list(b"The ferry to the outer island left at seven")])

    def logits(folder: Path, quant: str) -> torch.Tensor:
        with open_checkpoint(folder) as checkpoint:
            span = load_span(checkpoint, 0, 3, precision=precision_of(checkpoint, quant, "float32"))
        choose_attention(span.model, "eager")
        return span.logits(span.forward_cached(ids, [])[0][0])

    packed, decoded, original = logits(folder, format), logits(folder, "none"), logits(model, "none")
    noise = (packed - decoded).norm()
    assert noise < 0.02 * decoded.norm()
    assert noise < 0.5 * (decoded - original).norm()


def run_command(model: Path, out: Path) -> list[str]:
    """`petal quantize` as people type it."""
    text = str(model.parent / "text.txt")
    command = [
        sys.executable,
        "-c",
        "from petal.client.cli.main import main; main()",
        "quantize",
        str(model),
        "--format",
        "int4",
    ]
    return [*command, "--calibration", text, "--out", str(out), "--tokens", "1024", "--length", "64", "--device", "cpu"]


def test_a_killed_run_goes_on(model, tmp_path):
    whole, killed = quantized(model, "int4"), tmp_path / "killed"
    process = subprocess.Popen(run_command(model, killed), stderr=subprocess.DEVNULL)
    first, second = (killed / f"model-0000{number}-of-00004.safetensors" for number in (1, 2))
    while process.poll() is None and not second.exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "config.json").exists(), "killed too late to show anything"
    began = first.stat().st_mtime_ns
    with pytest.raises(CheckpointError, match="unfinished run of other settings"):
        quantize(options(model, "spqr", killed), Console(quiet=True))
    quantize(options(model, "int4", killed), Console(quiet=True))
    assert first.stat().st_mtime_ns == began
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
    for path in whole.iterdir():
        assert (killed / path.name).read_bytes() == path.read_bytes(), path.name


def test_refusals(model, tmp_path):
    quiet = Console(quiet=True)
    with pytest.raises(CheckpointError, match="give one of aqlm, spqr, int4"):
        quantize(options(model, "int3", tmp_path / "a"), quiet)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(CheckpointError, match="give at least 640"):
        quantize(options(model, "int4", tmp_path / "a", text=tmp_path / "short.txt"), quiet)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="cannot be read as text"):
        quantize(options(model, "int4", tmp_path / "a", text=tmp_path / "binary.txt"), quiet)
    made = quantized(model, "int4")
    with pytest.raises(CheckpointError, match="finished model"):
        quantize(options(model, "int4", made), quiet)
    with pytest.raises(CheckpointError, match="quantized already"):
        quantize(options(made, "int4", tmp_path / "c", text=model.parent / "text.txt"), quiet)


def test_the_command_refuses_in_one_line(model, tmp_path):
    command = run_command(model, tmp_path)
    arguments = command[command.index(str(model)) :]
    done = CliRunner().invoke(cli.app, [*arguments, "--device", "tpu"])
    assert done.exit_code == 2
    assert "give cpu or cuda" in done.output.replace("\n", " ")
    done = CliRunner().invoke(cli.app, [*arguments, "--calibration", str(tmp_path / "none.txt")])
    assert done.exit_code == 1
    assert "none.txt cannot be read" in done.output
    assert done.output.count("\n") == 1
