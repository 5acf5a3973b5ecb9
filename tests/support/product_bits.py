"""What this machine's kernels compute: `python -m tests.support.product_bits`, with whatever Petal is installed there.

Prints one JSON object: the file and the instruction set of the kernels, and a digest of what each operation gives.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator

import torch
from petal.kernels.backend import Backend, LayerSpec
from petal.kernels.cpu.backend import CpuBackend
from petal.kernels.cpu.library import kernels
from petal.kernels.formats.base import QuantizedTensor
from torch import Tensor

from ..kernels.batches import batch_of, chain, tree
from ..kernels.quantized_weights import VARIANTS, random_tensors


def digest(tensors: Iterable[Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def products(backend: Backend) -> Iterator[tuple[str, Tensor]]:
    """Each operation's name and what it gives."""
    torch.manual_seed(0)
    weight, bias, shape = torch.randn(300, 577), torch.randn(300), (300, 768)
    for rows in (1, 40):
        x, wide = torch.randn(rows, 577), torch.randn(rows, 768)
        for dtype in (torch.float32, torch.bfloat16):
            yield str(dtype), backend.linear(weight.to(dtype), bias)(x)
        for name, format in VARIANTS.items():
            yield name, backend.linear(QuantizedTensor(format, random_tensors(format, shape), shape), bias)(wide)
        yield "norm", backend.rms_norm(weight[0], 1e-5)(x)
        yield "gate", backend.silu_gate(8 * x, x.flip(0))
        turns = 6.3 * torch.rand(rows, 64)
        yield "rope", backend.rotate(wide.view(rows, 12, 64).clone(), turns.cos(), turns.sin())
    for kind in (torch.float32, torch.bfloat16):
        yield "attention", attended(backend, kind)


def attended(backend: Backend, dtype: torch.dtype) -> Tensor:
    """Attention of a ragged batch over a cache of that dtype."""
    batch = batch_of([(40, tree(9)), (0, chain(33)), (100, chain(1))], dtype=dtype).with_pages()
    storage = backend.kv_storage([LayerSpec(2, 64, 64, None)], *batch.k_pages.shape[:2], dtype)
    storage.keys, storage.values = [batch.k_pages], [batch.v_pages]
    return storage.attention([batch.metadata])(0, batch.q, batch.k, batch.v, scale=0.2)


def main() -> None:
    torch.set_num_threads(1)
    backend = CpuBackend()
    found: dict[str, list[Tensor]] = {}
    for name, tensor in products(backend):
        found.setdefault(name, []).append(tensor)
    loaded = kernels()
    assert loaded is not None
    bits = {name: digest(tensors) for name, tensors in found.items()}
    print(json.dumps({"file": str(loaded.path), "isa": loaded.isa.name, "bits": bits}))


if __name__ == "__main__":
    main()
