"""Each kernel under compute-sanitizer: `python -m tests.gpu.sanitize [--tool memcheck] [CASE ...]`.

It is 10 to 50 times slower than a run, so every case is a process of its own and small, and cases that passed before
are left out when the same command is given again (`--state`, a file). compute-sanitizer comes with CUDA's toolkit.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.gpu.__main__ import ROOT, environment

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LIMIT = 240  # seconds a case
FOUND = 9  # exit status where the tool found something
PRODUCTS = ("int4", "int4 by 32", "nf4", "int8", "int8 with outliers", "q4_0", "q4_1", "q8_0", "q5_k", "q6_k", "bf16",
            "aqlm", "aqlm-1x16")  # fmt: skip


def product(case: str) -> None:
    """Every tiling of a small, odd shape."""
    import torch
    from petal.kernels.cuda.linear import Linear
    from petal.kernels.cuda.runtime import runtime
    from petal.kernels.cuda.tiling import candidates

    from tests.kernels.cuda import test_linear

    linear = Linear(runtime(torch.device("cuda", 0)))
    weights, _ = test_linear.on_card(case, (200, 1280))
    for rows in (3, 13, 30, 60, 130):
        x = torch.randn(rows, 1280, device="cuda").bfloat16()
        for tiling in candidates(linear._card, weights.layout, 200, weights.depth_blobs, rows):
            test_linear.product(linear, weights, x, tiling)


def attention() -> None:
    import torch
    from petal.kernels.cuda.attention import Attention
    from petal.kernels.cuda.elementwise import Elementwise
    from petal.kernels.cuda.runtime import runtime

    from tests.kernels.batches import batch_of, chain, tree
    from tests.kernels.cuda import test_attention

    made = runtime(torch.device("cuda", 0))
    card = Attention(made), Elementwise(made)
    batch = batch_of([(200, tree(9)), (0, chain(70)), (1100, [-1])], (8, 2), (64, 64), torch.bfloat16)
    test_attention.attended(card, batch)
    test_attention.attended(card, batch, window=100)


def small() -> None:
    import torch
    from petal.kernels.cuda.attention import Attention
    from petal.kernels.cuda.elementwise import Elementwise
    from petal.kernels.cuda.runtime import runtime

    from tests.kernels.cuda import test_attention

    made = runtime(torch.device("cuda", 0))
    test_attention.test_norms_rotations_and_gates_are_right((Attention(made), Elementwise(made)))


CASES: dict[str, Callable[[], None]] = {
    "attention": attention,
    "small": small,
    **{name: lambda name=name: product(name) for name in PRODUCTS},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--tool", choices=TOOLS, default="memcheck")
    parser.add_argument("--state", type=Path, default=Path("build/sanitized.json"), help="which cases passed before")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        CASES[arguments.inside]()
        return 0
    if unknown := sorted(set(arguments.cases) - set(CASES)):
        parser.error(f"there is no case {unknown[0]}")
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    passed = json.loads(arguments.state.read_text()) if arguments.state.exists() else []
    arguments.state.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    settings = environment()
    for case in arguments.cases or CASES:
        if (name := f"{arguments.tool} {case}") in passed:
            continue
        command = [tool, "--tool", arguments.tool, "--error-exitcode", str(FOUND)]
        command += [sys.executable, "-m", "tests.gpu.sanitize", "--inside", case]
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=LIMIT,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"{name}: more than {LIMIT} s", flush=True)
            failed += 1
            continue
        print(f"{name}: {(done.stdout + done.stderr).strip().splitlines()[-1][:200]}", flush=True)
        if done.returncode:
            failed += 1
        else:
            passed.append(name)
            arguments.state.write_text(json.dumps(passed))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
