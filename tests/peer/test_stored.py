"""Quantized checkpoints as other programs write them, quantizing at load, and what a peer chooses by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from petal.kernels.cpu.quantized import QuantizedLinear, readable
from petal.kernels.formats.base import Format, Tensors
from petal.kernels.formats.fp8 import Fp8
from petal.kernels.formats.int4 import ROW, Int4
from petal.kernels.formats.nf4 import LEVELS, Nf4
from petal.kernels.formats.registry import FORMATS
from petal.kernels.registry import backend_for
from petal.kernels.torch.backend import TorchBackend
from petal.peer.model import Span, load_span
from petal.peer.model.precision import choose_precision, fitting_blocks, precision_of, span_bytes
from petal.peer.model.quantized_checkpoint import Storage
from petal.peer.options import QUANTS
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.open import open_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from ..kernels.quantized_weights import random_tensors
from ..protocol.gguf_maker import write_gguf
from ..support.families import expected_logits, served_logits
from ..support.tiny import tiny_llama

TOLERANCE = 0.04  # relative, Frobenius: products of bfloat16 through four blocks with large weights
UP = "model.layers.2.mlp.up_proj"
Keys = Callable[[str, Tensors, tuple[int, int]], dict[str, Tensor]]


def plain(path: str, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    return {f"{path}.{name}": tensor for name, tensor in tensors.items()}


def bitsandbytes_4(path: str, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": shape}
    offset = tensors.pop("offset", None)
    if offset is not None:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    blob = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    named = {f"{path}.weight.{name}": tensor for name, tensor in tensors.items() if name != "weight"}
    named[f"{path}.weight.quant_map"] = torch.tensor(LEVELS)
    return named | {f"{path}.weight": tensors["weight"], f"{path}.weight.quant_state.bitsandbytes__nf4": blob}


def bitsandbytes_8(path: str, tensors: Tensors, shape: tuple[int, int]) -> dict[str, Tensor]:
    return {f"{path}.weight": tensors["codes"], f"{path}.SCB": tensors["scales"] * 127}


AQLM = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1}
STORED: dict[str, tuple[str, Format, dict, Keys]] = {
    "nf4": ("nf4", Nf4(), {"quant_method": "bitsandbytes", "load_in_4bit": True}, bitsandbytes_4),
    "nf4, one level": ("nf4", Nf4(nested=False), {"quant_method": "bitsandbytes"}, bitsandbytes_4),
    "int8": ("int8", FORMATS["int8"], {"quant_method": "bitsandbytes", "load_in_8bit": True}, bitsandbytes_8),
    "aqlm": ("aqlm", FORMATS["aqlm"], AQLM | {"num_codebooks": 2, "nbits_per_codebook": 8}, plain),
    "aqlm 1x16": ("aqlm", FORMATS["aqlm-1x16"], AQLM | {"num_codebooks": 1, "nbits_per_codebook": 16}, plain),
    "spqr": ("spqr", FORMATS["spqr"], {"quant_method": "spqr", "bits": 3, "beta1": 16, "beta2": 16}, plain),
    "fp8": ("fp8", FORMATS["fp8"], {"quant_method": "fp8", "weight_block_size": [128, 128]}, plain),
    "fp8 in small blocks": ("fp8", Fp8((32, 64)), {"quant_method": "fp8", "weight_block_size": [32, 64]}, plain),
    "int4": ("int4", Int4(), {"quant_method": "petal", "format": "int4"}, plain),
    "int4 by row": ("int4", Int4(ROW), {"quant_method": "petal", "format": "int4"}, plain),
}
every_storage = pytest.mark.parametrize("kind", STORED)


def tensors_of(format: Format, weight: Tensor, seed: int) -> Tensors:
    """Of the weight where that needs no calibration, else random ones of its size."""
    if format.name in ("int8", "int4", "nf4", "fp8"):
        return format.quantize(weight)
    tensors, size = random_tensors(format, tuple(weight.shape), seed), weight.norm() * weight.shape[1] ** -0.5
    if "scales" in tensors:
        tensors["scales"] = tensors["scales"] * float(size / 2)
    return tensors


def write(kind: str, folder: Path) -> LlamaForCausalLM:
    """A checkpoint of the kind in `folder`, and transformers' model with the same weights, dense."""
    _, format, config, keys = STORED[kind]
    model = LlamaForCausalLM.from_pretrained(tiny_llama())
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for seed, (path, module) in enumerate(model.model.layers.named_modules(prefix="model.layers")):
        if isinstance(module, nn.Linear):
            shape = tuple(module.weight.shape)
            tensors = tensors_of(format, state.pop(f"{path}.weight"), seed)
            dense = format.dequantize(tensors, shape, torch.float32)
            module.weight = nn.Parameter(dense)
            state |= keys(path, tensors, shape)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": config}))
    return model.eval()


def spans(folder: Path, quant: str, dtype: str | None = None) -> list[Span]:
    with open_checkpoint(folder, folder.parent / "digests") as checkpoint:
        precision = precision_of(checkpoint, quant, dtype)
        return [load_span(checkpoint, start, start + 2, precision=precision) for start in (0, 2)]


def distance(found: list[Span], model: LlamaForCausalLM) -> float:
    with torch.inference_mode():
        expected = expected_logits(model)
        return float((served_logits(found) - expected).norm() / expected.norm())


@every_storage
def test_stored_weights_stay_packed_and_give_the_logits_of_their_values(kind: str, tmp_path: Path):
    quant, format, _, _ = STORED[kind]
    model = write(kind, tmp_path / "tiny")
    kept = spans(tmp_path / "tiny", quant)
    assert distance(kept, model) <= TOLERANCE
    linears = [m for m in kept[0].model.modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == (14 if readable(format) else 0)
    assert {m.format.name for m in linears} <= {format.name}
    assert not kept[0].exactness_obstacle()
    assert distance(spans(tmp_path / "tiny", "none", "float32"), model) <= 1e-4


def test_a_gguf_file_stays_packed_with_embedding_and_head(tmp_path: Path):
    model = LlamaForCausalLM.from_pretrained(tiny_llama(tied=True)).eval()
    write_gguf(tmp_path / "tiny.gguf", model, gguf.GGMLQuantizationType.Q8_0)
    dense = [load_span(open_checkpoint(tmp_path / "tiny.gguf"), 0, 4)]
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        whole = load_span(checkpoint, 0, 4, precision=precision_of(checkpoint, "gguf"))
        first, last = (load_span(checkpoint, *b, precision=precision_of(checkpoint, "gguf")) for b in ((0, 1), (1, 4)))
        stored = sum(info.nbytes for info in checkpoint.tensors.values())
    assert whole.nbytes < 1.2 * stored < 0.4 * dense[0].nbytes  # the tied matrix is held once
    expected = served_logits(dense)
    for kept in ([whole], [first, last]):
        assert (served_logits(kept) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert torch.equal(served_logits([whole]), served_logits([first, last]))


def test_a_tied_matrix_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It is most of a small model: read for the embedding and for the head it would be held twice meanwhile."""
    read: list[str] = []
    real = Storage.read
    monkeypatch.setattr(
        Storage, "read", lambda self, c, name, wanted: (read.append(name), real(self, c, name, wanted))[1]
    )
    write_gguf(
        tmp_path / "tiny.gguf", LlamaForCausalLM.from_pretrained(tiny_llama(tied=True)), gguf.GGMLQuantizationType.Q8_0
    )
    with open_checkpoint(tmp_path / "tiny.gguf") as checkpoint:
        precision = precision_of(checkpoint, "gguf")
        whole = load_span(checkpoint, 0, 4, precision=precision)
        assert len(read) == len(set(read)) == 4 * 7 + 1
        read.clear()
        load_span(checkpoint, 1, 4, precision=precision)
        assert "model.embed_tokens.weight" in read, "a last stage reads it for its head alone"
    assert whole.model.get_input_embeddings().matrix is whole.model.get_output_embeddings()


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_a_scaled_embedding_stays_packed_too(kind: str, tmp_path: Path):
    """As small models are stored: of 5 bits, and Gemma's embedding, which its family multiplies, is its head."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, query_pre_attn_scalar=32, sliding_window=8, max_position_embeddings=512,
        initializer_range=0.2,
    )  # fmt: skip
    path = tmp_path / "tiny.gguf"
    write_gguf(path, AutoModelForCausalLM.from_config(config).eval(), gguf.GGMLQuantizationType[kind])
    dense = [load_span(open_checkpoint(path), 0, 4)]
    with open_checkpoint(path) as checkpoint:
        precision = precision_of(checkpoint, "gguf")
        whole, first, last = (load_span(checkpoint, *b, precision=precision) for b in ((0, 4), (0, 1), (1, 4)))
        stored = sum(info.nbytes for info in checkpoint.tensors.values())
        embedding = checkpoint.info("model.embed_tokens.weight").nbytes
    assert whole.nbytes < 1.2 * stored < 0.4 * dense[0].nbytes  # the tied matrix is held once
    assert first.nbytes < stored / 4 + 1.2 * embedding
    linears = [module.format.name for module in whole.model.modules() if isinstance(module, QuantizedLinear)]
    assert set(linears) == {kind.lower()}
    assert len(linears) >= 4 * 7 + 1
    expected = served_logits(dense)
    for kept in ([whole], [first, last]):
        assert (served_logits(kept) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert torch.equal(served_logits([whole]), served_logits([first, last]))


@pytest.mark.parametrize("quant", ["int8", "int4", "nf4"])
def test_quantizing_while_reading(quant: str):
    format, model = FORMATS[quant], LlamaForCausalLM.from_pretrained(tiny_llama()).eval()
    original = distance(spans(tiny_llama(), quant), model)
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            shape = tuple(module.weight.shape)
            tensors = format.quantize(module.weight)
            module.weight = nn.Parameter(format.dequantize(tensors, shape, torch.float32))
    found = spans(tiny_llama(), quant)
    assert distance(found, model) <= TOLERANCE
    assert quant == "int8" or original > 2 * TOLERANCE  # negative control: the reference is quantized too
    with open_checkpoint(tiny_llama()) as checkpoint:
        for span in found:
            estimate = span_bytes(
                checkpoint, precision_of(checkpoint, quant), range(span.start, span.end), span.backend
            )
            assert estimate * 0.85 < span.nbytes < estimate * 1.15


def test_what_a_backend_holds_otherwise_than_stored_is_counted_so(tmp_path: Path):
    """The CPU multiplies fp8 weights as bfloat16 ones."""
    write("fp8", tmp_path / "tiny")
    (span, _) = spans(tmp_path / "tiny", "fp8")
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        estimate = span_bytes(checkpoint, precision_of(checkpoint, "fp8"), range(0, 2), span.backend)
    assert estimate * 0.85 < span.nbytes < estimate * 1.15


def _drop(suffix: str):
    return lambda state: [state.pop(name) for name in list(state) if name == f"{UP}.{suffix}"]


def _change(suffix: str, change: Callable[[Tensor], Tensor]):
    return lambda state: state.update({f"{UP}.{suffix}": change(state[f"{UP}.{suffix}"]).contiguous()})


@pytest.mark.parametrize(
    ("kind", "spoil", "sentence"),
    [
        ("aqlm", _drop("scales"), "lack scales"),
        ("aqlm", _drop("codes"), "holds the tensor .*up_proj"),
        ("aqlm", _change("codes", lambda t: t[1:]), r"has shape \[127, 64\], the config asks for \[128, 64\]"),
        ("aqlm", _change("codebooks", lambda t: t.float()), "codebooks of aqlm weights is torch.float32"),
        ("spqr", _change("col_vals", lambda t: t | 0xFFFF), "column 65535 of 64"),
        ("spqr", _change("dense_weights", lambda t: t[:64]), "dense_weights|config asks"),
        ("int4", _drop("zeros"), "lack zeros"),
        ("int4", _change("zeros", lambda t: t + 16), "0 to 15"),
        ("nf4", _drop("weight.nested_absmax"), "lack nested_absmax"),
        ("nf4", _change("weight.quant_map", lambda t: -t), "levels are not those of NF4"),
        ("nf4", _change("weight.quant_state.bitsandbytes__nf4", lambda t: t[3:]), "quantization state"),
        ("int8", _change("SCB", lambda t: t * torch.inf), "not finite"),
        ("fp8", _change("weight_scale_inv", lambda t: t * torch.nan), "not finite"),
        ("fp8", _change("weight_scale_inv", lambda t: t.repeat(2, 1)), r"float32 \[2, 1\], torch.float32 \[1, 1\]"),
        ("fp8", _drop("weight"), "lack|consist of weight, weight_scale_inv"),
    ],
)
def test_broken_quantized_tensors_are_refused(kind: str, spoil, sentence: str, tmp_path: Path):
    write(kind, tmp_path / "tiny")
    state = load_file(tmp_path / "tiny" / "model.safetensors")
    spoil(state)
    save_file(state, tmp_path / "tiny" / "model.safetensors")
    with pytest.raises(CheckpointError, match=sentence) as caught:
        spans(tmp_path / "tiny", STORED[kind][0])
    assert re.fullmatch(r"[^\n]+\.", str(caught.value))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"quant_method": "gptq"}, "'gptq': bitsandbytes, aqlm, spqr, int4, fp8 can be read"),
        ({"quant_method": "fp8"}, "weight_block_size"),
        ({"quant_method": "fp8", "weight_block_size": [128, 100]}, "a multiple of 64 columns, not of 100"),
        ({"quant_method": "aqlm", "in_group_size": 16}, "groups of 8"),
        (AQLM | {"num_codebooks": 9, "nbits_per_codebook": 8}, "1 to 4 codebooks"),
        ({"quant_method": "spqr", "bits": 4}, "3 bits"),
        ({"quant_method": "bitsandbytes"}, "NF4 or int8"),
    ],
)
def test_quantizations_that_cannot_be_read_are_named(config: dict, sentence: str, tmp_path: Path):
    LlamaForCausalLM.from_pretrained(tiny_llama()).save_pretrained(tmp_path / "tiny")
    path = tmp_path / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=sentence):
        spans(tmp_path / "tiny", "none")


def test_a_peer_keeps_what_is_stored_and_else_quantizes_as_far_as_it_must(tmp_path: Path):
    backend, slow = backend_for(), TorchBackend(torch.device("cpu"))
    write("nf4", tmp_path / "tiny")
    with open_checkpoint(tmp_path / "tiny") as checkpoint:
        assert choose_precision(checkpoint, None, None, 1 << 30, backend).quant == "nf4"
        assert choose_precision(checkpoint, None, None, 1 << 30, slow).quant == "none"
        with pytest.raises(CheckpointError, match="does not store aqlm weights: choose --quant none, int8, int4, nf4"):
            precision_of(checkpoint, "aqlm")
    with open_checkpoint(tiny_llama()) as checkpoint:
        sizes = {
            quant: span_bytes(checkpoint, precision_of(checkpoint, quant), range(4), backend) for quant in QUANTS[:3]
        }
        assert sizes["none"] > 2 * sizes["int8"] > 2 * sizes["int4"]
        for quant, size in sizes.items():
            assert choose_precision(checkpoint, None, None, size + 1000, backend).quant == quant
            assert fitting_blocks(checkpoint, precision_of(checkpoint, quant), size + 1000, backend) == 4
        assert choose_precision(checkpoint, None, None, 0, backend).quant == "int4"
        assert fitting_blocks(checkpoint, precision_of(checkpoint, "int4"), 0, backend) == 0
        assert choose_precision(checkpoint, None, 1, sizes["none"] // 2, backend).quant == "none"
