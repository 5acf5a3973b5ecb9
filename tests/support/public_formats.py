"""What the packages that defined NF4 and AQLM make of a few weights, recorded so that no test run needs them.

`python -m tests.support.public_formats` records it anew; that takes the packages bitsandbytes and aqlm.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from petal.kernels.formats.aqlm import Aqlm
from petal.kernels.formats.registry import FORMATS
from torch import Tensor

from ..kernels.quantized_weights import random_tensors

RECORD = Path(__file__).parents[1] / "data" / "public_formats.npz"
NF4_SHAPES = [(33, 51), (64, 64), (96, 192)]
AQLM_SHAPE = (24, 64)
AQLM = ("aqlm", "aqlm-1x16")


def recorded(name: str) -> dict[str, Tensor]:
    """The tensors recorded under `name`: an AQLM format, or `nf4` and the place of a shape in NF4_SHAPES."""
    with np.load(RECORD) as file:
        found = {key: file[key] for key in file.files if key.startswith(f"{name}/")}
    return {key.partition("/")[2]: torch.from_numpy(value) for key, value in found.items()}


def of_bitsandbytes(shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Weights, the bytes that bitsandbytes makes of them with double quantization, and what it decodes these to."""
    import bitsandbytes.functional as bnb  # type: ignore[import-not-found]

    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5).half().float()
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return {
        "dense": weight.half(),
        "weight": packed,
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "nested_quant_map": state.state2.code,
        "offset": state.offset.reshape(1),
        "decoded": bnb.dequantize_4bit(packed, state),
    }


def of_aqlm(format: Aqlm) -> dict[str, Tensor]:
    """Random tensors of the format, their codebooks empty but for what is used, and what aqlm decodes them to."""
    from aqlm import utils  # type: ignore[import-not-found]

    tensors = random_tensors(format, AQLM_SHAPE)
    codes = utils.unpack_int_data(tensors["codes"], format.bits)
    for book, used in zip(tensors["codebooks"], codes.unbind(2), strict=True):
        idle = torch.ones(len(book), dtype=torch.bool)
        idle[used.flatten().long()] = False
        book[idle] = 0
    decoded = utils._dequantize_weight(codes, tensors["codebooks"].float(), tensors["scales"].float())
    return {**tensors, "decoded": decoded}


def main() -> None:
    parts = {f"nf4 {place}": of_bitsandbytes(shape, place) for place, shape in enumerate(NF4_SHAPES)}
    for name in AQLM:
        format = FORMATS[name]
        assert isinstance(format, Aqlm)
        parts[name] = of_aqlm(format)
    arrays = {f"{name}/{key}": value.numpy() for name, part in parts.items() for key, value in part.items()}
    np.savez_compressed(RECORD, **arrays)
    print(f"{RECORD}: {RECORD.stat().st_size} bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
