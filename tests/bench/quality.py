"""What each weight format costs in quality: `python -m tests.bench.quality --json`.

SmolLM2's blocks in each format against the same model in float32, on a committed text: perplexity, mean and 99th
percentile of the KL divergence, how often the likeliest token is the same, bytes a weight. `--unquantized` measures a
byte-level Llama that is trained on the spot instead: SmolLM2's published file is int4 in groups of 32 already, so that
other grids lose more on it than on a model that no grid has touched.

Formats that need calibration are made by `petal quantize` in --work, and taken from there the next time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from petal.kernels.formats.base import Format
from petal.kernels.formats.int4 import Int4
from petal.kernels.formats.registry import FORMATS
from petal.peer.model.quantized_checkpoint import storage_of
from petal.peer.quantize.run import Options, quantize
from petal.protocol.checkpoint.checkpoint import Checkpoint
from petal.protocol.checkpoint.open import open_checkpoint
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..support.byte_llama import new_llama, save, train
from ..support.k_quants import encode
from ..support.reference import DATA, demo_checkpoint, load_reference

EVALUATION, CALIBRATION = DATA / "evaluation.txt", DATA / "calibration.txt"
CALIBRATED = ("int4", "spqr", "aqlm")
# Llama-3-8B's, by llama.cpp: perplexity's relative rise.
PUBLISHED = {"q8_0": 0.003 / 6.23, "q6_k": 0.022 / 6.23, "q4_k": 0.175 / 6.23}


@dataclass(frozen=True)
class Quality:
    """One format; KL divergences in nats from the model in float32, bytes a weight of the blocks' linears."""

    format: str
    bytes_per_weight: float
    perplexity: float
    mean_kl: float
    p99_kl: float
    agreement: float
    seconds: float


class Judge:
    """A model in float32 and what it says about a text."""

    def __init__(self, model: PreTrainedModel, rows: Tensor, device: str) -> None:
        """rows: token ids [n, length]."""
        self.model, self._rows = model.to(device), rows.to(device)
        stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList))
        blocks = set(next(stacks).modules())
        self.linears = {
            path: module for path, module in model.named_modules() if type(module) is nn.Linear and module in blocks
        }
        self._known = list(self._log_probabilities())

    @torch.inference_mode()
    def _log_probabilities(self) -> Iterator[Tensor]:
        for row in self._rows:
            yield self.model(input_ids=row[None]).logits[0, :-1].float().log_softmax(1)

    @torch.inference_mode()
    def judge(self, name: str, nbytes: int, seconds: float) -> Quality:
        """The model as its weights are now."""
        losses, divergences, same = [], [], []
        for row, known, found in zip(self._rows, self._known, self._log_probabilities(), strict=True):
            losses.append(-found.gather(1, row[1:, None])[:, 0])
            divergences.append((known.exp() * (known - found)).sum(1))
            same.append(known.argmax(1) == found.argmax(1))
        kl = torch.cat(divergences).double()
        weights = sum(linear.weight.numel() for linear in self.linears.values())
        return Quality(
            format=name,
            bytes_per_weight=round(nbytes / weights, 4),
            perplexity=round(float(torch.cat(losses).double().mean().exp()), 4),
            mean_kl=round(float(kl.mean()), 6),
            p99_kl=round(float(kl.quantile(0.99)), 6),
            agreement=round(float(torch.cat(same).float().mean()), 5),
            seconds=round(seconds, 1),
        )

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Weights that are changed inside come back."""
        saved = {name: parameter.data for name, parameter in self.model.named_parameters()}
        try:
            yield
        finally:
            for name, parameter in self.model.named_parameters():
                parameter.data = saved[name]

    def rounded(self, name: str, rounding: Callable[[Tensor], tuple[Tensor, int]]) -> Quality:
        """Every linear by itself: its weight -> the rounded weight and its bytes."""
        began, nbytes = time.monotonic(), 0
        with self.as_it_was():
            for linear in self.linears.values():
                dense, own = rounding(linear.weight.data)
                linear.weight.data, nbytes = dense.float(), nbytes + own
            return self.judge(name, nbytes, time.monotonic() - began)

    def stored(self, name: str, made: Checkpoint, seconds: float) -> Quality:
        """The weights of a checkpoint that `petal quantize` made, as a peer reads them."""
        nbytes, device, storage = 0, self._rows.device, storage_of(made)
        with self.as_it_was():
            for path, linear in self.linears.items():
                weight = f"{path}.weight"
                packed = storage.read(made, weight, (linear.out_features, linear.in_features))
                linear.weight.data = packed.dense().to(device)
                nbytes += storage.nbytes(made, weight)
            for key, parameter in self.model.named_parameters():
                if key.removesuffix(".weight") not in self.linears and key in made.tensors:
                    parameter.data = torch.from_numpy(made.read_f32(key).copy()).to(device)
            return self.judge(name, nbytes, seconds)


def in_format(format: Format) -> Callable[[Tensor], tuple[Tensor, int]]:
    """What quantizing at load does."""

    def rounding(weight: Tensor) -> tuple[Tensor, int]:
        shape = (weight.shape[0], weight.shape[1])
        tensors = format.quantize(weight)
        dense = format.dequantize(tensors, shape, torch.float32)
        return dense, sum(tensor.nbytes for tensor in tensors.values())

    return rounding


def k_quant(name: str) -> Callable[[Tensor], tuple[Tensor, int]]:
    """A K-quant, rounded by our own search."""

    def rounding(weight: Tensor) -> tuple[Tensor, int]:
        blocks, format = encode(name, weight), FORMATS[name]
        shape = (weight.shape[0], weight.shape[1])
        return format.dequantize({"blocks": blocks}, shape, torch.float32), blocks.numel()

    return rounding


def int3(weight: Tensor) -> tuple[Tensor, int]:
    """Round to nearest of 8 levels in groups of 64, with a float16 scale and a one-byte zero each."""
    groups = weight.unflatten(1, (-1, 64))
    low, high = groups.amin(2, True).clamp(max=0), groups.amax(2, True).clamp(min=0)
    scale = ((high - low) / 7).half().float().clamp(min=1e-7)
    zero = (-low / scale).round().clamp(0, 7)
    dense = ((groups / scale + zero).round().clamp(0, 7) - zero) * scale
    return dense.flatten(1), weight.numel() * 3 // 8 + 3 * scale.numel()


def roundings(unquantized: bool) -> dict[str, Callable[[Tensor], tuple[Tensor, int]]]:
    """Formats that need no calibration, by the name of their row."""
    found = {name: in_format(FORMATS[name]) for name in ("bf16", "int8", "nf4", "q8_0", "q4_1", "q4_0")}
    found["int4 g64 nearest"] = in_format(Int4(64))
    if unquantized:
        return found | {name: k_quant(name) for name in ("q6_k", "q5_k", "q4_k")}
    return found | {"int4 g32 nearest": in_format(Int4(32)), "int3 g64 nearest": int3}


def measure(checkpoint: Checkpoint, ids: list[int], arguments: argparse.Namespace) -> Iterator[Quality]:
    """A row for each format."""
    length = min(arguments.length, len(ids))
    rows = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    judge = Judge(load_reference(checkpoint), rows, arguments.device)
    yield judge.judge("fp32", 4 * sum(linear.weight.numel() for linear in judge.linears.values()), 0.0)
    for name, rounding in roundings(arguments.unquantized).items():
        if not arguments.formats or name in arguments.formats:
            yield judge.rounded(name, rounding)
    for name in CALIBRATED:
        if not arguments.formats or name in arguments.formats:
            began, out = time.monotonic(), arguments.work / name
            if not (out / "config.json").exists():
                model = arguments.model or "demo"
                text, tokens, length = arguments.calibration, arguments.tokens, arguments.length
                quantize(Options(model, name, text, out, arguments.device, tokens, length, 0), Console(stderr=True))
            with open_checkpoint(out) as made:
                yield judge.stored(name, made, time.monotonic() - began)


def bars(rows: Mapping[str, Quality], unquantized: bool) -> list[dict[str, object]]:
    """What is promised of the formats that were measured: value, limit, and whether it is kept."""
    kl = {name: row.mean_kl for name, row in rows.items()}
    rise = {name: row.perplexity / rows["fp32"].perplexity - 1 for name, row in rows.items()}
    if unquantized:
        promised = [("int4 g64 nearest", rise, 0.06), ("nf4", rise, 0.06)]
        promised += [(name, rise, limit) for name, limit in PUBLISHED.items()]
        figure = "rise of perplexity"
    else:
        promised = [
            ("int8", kl, 0.004),
            ("int4", kl, 0.5 * kl.get("int4 g64 nearest", 0.0)),
            ("spqr", kl, 0.5 * kl.get("int4 g64 nearest", 0.0)),
            ("aqlm", kl, 0.5 * kl.get("int3 g64 nearest", 0.0)),
        ]
        figure = "mean KL"
    return [
        {"format": name, "figure": figure, "value": of[name], "limit": limit, "kept": of[name] <= limit}
        for name, of, limit in promised
        if name in rows and limit
    ]


def trained(arguments: argparse.Namespace, folder: Path) -> Path:
    """The byte-level Llama's folder."""
    llama = new_llama(arguments.width, arguments.blocks)
    loss = train(llama, arguments.calibration.read_bytes(), arguments.steps, arguments.device)
    print(f"trained {arguments.steps} steps: {loss:.3f} nats a byte", file=sys.stderr)
    return save(llama, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--formats", nargs="*", help="only these rows")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION, help="text that is fitted to")
    parser.add_argument("--work", type=Path, help="keep what `petal quantize` makes here")
    parser.add_argument("--length", type=int, default=1020, help="tokens in a row")
    parser.add_argument("--tokens", type=int, default=131072, help="tokens to calibrate with")
    parser.add_argument("--unquantized", action="store_true", help="measure on a model trained on the spot")
    parser.add_argument("--width", type=int, default=512, help="of that model, a multiple of 256")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        arguments.work = arguments.work or Path(folder)
        arguments.model = str(trained(arguments, Path(folder) / "trained")) if arguments.unquantized else None
        arguments.length = min(arguments.length, 512) if arguments.unquantized else arguments.length
        checkpoint = open_checkpoint(arguments.model) if arguments.model else demo_checkpoint()
        ids = checkpoint.tokenizer().encode(EVALUATION.read_text("utf-8"))
        rows = {}
        for row in measure(checkpoint, ids, arguments):
            rows[row.format] = row
            print(row, file=sys.stderr)
    report = {"rows": [asdict(row) for row in rows.values()], "bars": bars(rows, arguments.unquantized)}
    if arguments.json:
        print(json.dumps(report))
        return
    for bar in report["bars"]:
        print(bar)


if __name__ == "__main__":
    main()
