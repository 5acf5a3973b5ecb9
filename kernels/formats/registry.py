"""All weight formats by name."""

from __future__ import annotations

import torch

from . import gguf
from .aqlm import Aqlm
from .base import Format
from .dense import Dense
from .fp8 import Fp8
from .int4 import Int4
from .int8 import Int8
from .mxfp4 import Mxfp4
from .nf4 import Nf4
from .spqr import Spqr

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Dense("bf16", torch.bfloat16),
        Dense("fp16", torch.float16),
        Dense("fp32", torch.float32),
        Int8(),
        Int4(),
        Nf4(),
        Mxfp4(),
        Fp8(),
        Aqlm(2, 8),
        Aqlm(1, 16),
        Spqr(),
        *gguf.TYPES.values(),
    )
}
