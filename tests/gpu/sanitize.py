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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.gpu.__main__ import ROOT, environment

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LIMIT = 240  # seconds a case
FOUND = 9  # exit status where the tool found something
PRODUCTS = ("int4", "int4 by 32", "nf4", "int8", "int8 with outliers", "q4_0", "q4_1", "q8_0", "q5_k", "q6_k", "bf16",
            "aqlm", "aqlm-1x16", "mxfp4", "fp8", "spqr")  # fmt: skip


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


def grouped() -> None:
    """Experts and adapters."""
    import torch
    from petal.kernels.cuda.experts import Experts
    from petal.kernels.cuda.runtime import runtime

    from tests.kernels.cuda import test_adapters, test_experts

    made = runtime(torch.device("cuda", 0))
    test_experts.test_all_rows_may_choose_the_same_expert(Experts(made))
    test_adapters.test_each_row_has_its_own(made, 99, 31, (4, 16))


CASES: dict[str, Callable[[], None]] = {
    "attention": attention,
    "small": small,
    "grouped": grouped,
    **{name: lambda name=name: product(name) for name in PRODUCTS},
}


def examined(tool: str, case: str) -> tuple[str, bool, str]:
    """A case in a process of its own: its last line, whether nothing was found, and all that was said."""
    path = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [path, "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    command += [sys.executable, "-m", "tests.gpu.sanitize", "--inside", case]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=LIMIT, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"more than {LIMIT} s", False, ""
    return (done.stdout.strip() or "nothing").splitlines()[-1][:200], done.returncode == 0, done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--tool", choices=TOOLS, default="memcheck")
    parser.add_argument("--state", type=Path, default=Path("build/sanitized.json"), help="which cases passed before")
    parser.add_argument("--logs", type=Path, default=Path("build"), help="a folder for what is said of failed cases")
    parser.add_argument("--jobs", type=int, default=1, help="cases side by side")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        CASES[arguments.inside]()
        return 0
    if unknown := sorted(set(arguments.cases) - set(CASES)):
        parser.error(f"there is no case {unknown[0]}")
    passed = json.loads(arguments.state.read_text()) if arguments.state.exists() else []
    for folder in (arguments.state.parent, arguments.logs):
        folder.mkdir(parents=True, exist_ok=True)
    cases = [case for case in arguments.cases or CASES if f"{arguments.tool} {case}" not in passed]
    failed = 0
    with ThreadPoolExecutor(arguments.jobs) as workers:
        runs = {workers.submit(examined, arguments.tool, case): f"{arguments.tool} {case}" for case in cases}
        for run in as_completed(runs):
            name, (last, well, said) = runs[run], run.result()
            print(f"{name}: {last}", flush=True)
            failed += not well
            if well:
                passed.append(name)
                arguments.state.write_text(json.dumps(passed))
            else:
                (arguments.logs / f"{name.replace(' ', '-')}.log").write_text(said)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
