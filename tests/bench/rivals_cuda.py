"""Other programs' products on a card, as the part `rivals` of `tests.bench.kernels_cuda`: those that are installed.

bitsandbytes' NF4, Humming's int4 (as it comes, and invariant over rows), tinygemm's int4 (torch's own), AQLM's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from petal.kernels.cuda.blobs import LAYOUTS
from torch import Tensor

from tests.bench import kernels_cuda as products

if TYPE_CHECKING:
    from tests.bench.kernels_cuda import Bench

SHAPES = ((28672, 8192), (8192, 8192))
ROWS = (1, 16, 64, 256)
Product = Callable[[Tensor], Tensor]


def bitsandbytes_nf4(shape: tuple[int, int]) -> Product:
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, codes.t(), quant_state=state)


def humming_int4(shape: tuple[int, int], invariant: bool = False) -> Product:
    from humming.layer import HummingLayer

    config = {"dtype": "uint4", "group_size": 64, "has_zero_point": False}
    layer = HummingLayer(shape_n=shape[0], shape_k=shape[1], weight_config=config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_unquantized(torch.randn(shape, device="cuda", dtype=torch.bfloat16))
    layer.transform()
    compute = json.dumps({"use_batch_invariant": invariant})
    return lambda x: layer(x, compute_config=compute)


def tinygemm_int4(shape: tuple[int, int]) -> Product:
    pairs = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8, device="cuda")
    packed = torch._convert_weight_to_int4pack(pairs, 8)
    numbers = torch.rand(shape[1] // 64, shape[0], 2, device="cuda").bfloat16()
    return lambda x: torch._weight_int4pack_mm(x, packed, 64, numbers)


def aqlm(shape: tuple[int, int], books: int, bits: int) -> Product:
    from aqlm.inference_kernels import cuda_kernel

    assert cuda_kernel
    operation: Any = getattr(torch.ops.aqlm, f"code{books}x{bits}_matmat")
    code = torch.int8 if bits == 8 else torch.int16
    codes = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (shape[0], shape[1] // 8, books), device="cuda").to(code)
    codebooks = torch.randn(books, 1 << bits, 1, 8, device="cuda").half()
    scales = torch.rand(shape[0], 1, 1, 1, device="cuda").half()
    return lambda x: operation(x.half(), codes, codebooks, scales, None)


RIVALS: dict[str, tuple[str, Callable[[tuple[int, int]], Product]]] = {
    "bitsandbytes nf4": ("Nf4", bitsandbytes_nf4),
    "humming int4": ("Int4", humming_int4),
    "humming int4, invariant": ("Int4", lambda shape: humming_int4(shape, invariant=True)),
    "tinygemm int4": ("Int4", tinygemm_int4),
    "aqlm 2x8": ("Aqlm2x8", lambda shape: aqlm(shape, 2, 8)),
    "aqlm 1x16": ("Aqlm1x16", lambda shape: aqlm(shape, 1, 16)),
}


def rows(bench: Bench) -> Iterator[dict]:
    """Each rival's time, and ours in the same format right after it."""
    wanted = os.environ.get("PETAL_RIVALS", ";".join(RIVALS)).split(";")
    for shape in SHAPES:
        for name in wanted:
            layout, make = RIVALS[name]
            try:
                copies = [make(shape) for _ in range(max(2, int(products.ROTATE // (shape[0] * shape[1] / 2)) + 1))]
            except (ImportError, RuntimeError, AssertionError, TypeError) as error:
                print(f"{name} is not measured: {str(error).strip()[:200] or type(error).__name__}", flush=True)
                continue
            ours = bench.copies(LAYOUTS[layout], shape)
            for m in ROWS:
                yield from _pair(bench, name, layout, shape, m, copies, ours)


def _pair(
    bench: Bench, name: str, layout: str, shape: tuple[int, int], m: int, copies: list[Product], ours: list[Any]
) -> Iterator[dict]:
    x = torch.randn(m, shape[1], device="cuda", dtype=torch.bfloat16)
    floor = bench.ceilings.floor(LAYOUTS[layout], shape, m)
    calls = [lambda product=product: product(x) for product in copies * max(1, 6 // len(copies))]
    try:
        ms = products.graph_ms(calls)
    except RuntimeError as error:
        print(f"{name} at {m} rows is not measured: {str(error).strip()[:200]}", flush=True)
        torch.cuda.synchronize()
        return
    row = {"format": name, "shape": f"{shape[0]}x{shape[1]}", "M": m, "ms": ms, "floor_ms": floor, "ratio": ms / floor}
    yield row | {"ours_ms": bench.ms(ours, m, bench.linear.tiling(ours[0], m))}
