"""Formats of weights, each with the name of the layout that the kernels read it in."""

from __future__ import annotations

from petal.kernels.formats.fp8 import Fp8
from petal.kernels.formats.int4 import Int4
from petal.kernels.formats.int8 import Int8
from petal.kernels.formats.registry import FORMATS

CASES = {
    "bf16": (FORMATS["bf16"], "Bf16"),
    "int4": (FORMATS["int4"], "Int4"),
    "int4 by 128": (Int4(128), "Int4"),
    "int4 by 32": (Int4(32), "Int4Group32"),
    "nf4": (FORMATS["nf4"], "Nf4"),
    "mxfp4": (FORMATS["mxfp4"], "Mxfp4"),
    "fp8": (FORMATS["fp8"], "Fp8"),
    "fp8 by rows": (Fp8((1, 4096)), "Fp8"),
    "int8": (FORMATS["int8"], "Int8"),
    "q4_0": (FORMATS["q4_0"], "Q4_0"),
    "q4_1": (FORMATS["q4_1"], "Q4_1"),
    "q8_0": (FORMATS["q8_0"], "Q8_0"),
    "q4_k": (FORMATS["q4_k"], "Q4_1"),
    "q5_k": (FORMATS["q5_k"], "Q5_K"),
    "q6_k": (FORMATS["q6_k"], "Q6_K"),
    "int8 with outliers": (Int8(threshold=1.2, most_outliers=0.02), "Int8"),
    "aqlm": (FORMATS["aqlm"], "Aqlm2x8"),
    "aqlm-1x16": (FORMATS["aqlm-1x16"], "Aqlm1x16"),
    "spqr": (FORMATS["spqr"], "Spqr"),
}
