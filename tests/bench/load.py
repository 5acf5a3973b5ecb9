"""Time and memory to get a third of SmolLM2 ready to compute: `python -m tests.bench.load [--json]`.

Each storage is opened by a process of its own, whose peak resident memory counts from its first instruction: the
interpreter, torch and transformers, file pages and all. Files are read once before, so that the disk is warm.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCKS = (0, 10)
ROUNDS = 3
BAR_S, BAR_OVERHEAD_MB = 5.0, 400.0


def measure(path: str) -> dict[str, float]:
    """Open and load in this process."""
    from petal.peer.model import load_span
    from petal.protocol.checkpoint.open import open_checkpoint

    imports_mb = _resident_mb("VmRSS")
    started = time.perf_counter()
    with open_checkpoint(path) as checkpoint:
        span = load_span(checkpoint, *BLOCKS)
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "imports_mb": imports_mb,
        "peak_mb": _resident_mb("VmHWM"),
        "span_mb": span.nbytes / 1e6,
    }


def _resident_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def in_child(path: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.load", "--of", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def save_safetensors(folder: Path) -> None:
    """The demo model as transformers would save it, in bfloat16."""
    import torch

    from tests.support.reference import demo_reference

    demo_reference().to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="The JSON line alone.")
    parser.add_argument("--of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of:
        print(json.dumps(measure(options.of)))
        return
    from tests.bench.swarm import report  # late: the measured process has no part in it

    with tempfile.TemporaryDirectory(prefix="petal-load-") as folder:
        command = [sys.executable, "-c", f"from tests.bench.load import *; save_safetensors(Path({folder!r}))"]
        subprocess.run(command, check=True, capture_output=True)
        found = {}
        for name, path in {"gguf": "demo", "safetensors": folder}.items():
            runs = [in_child(path) for _ in range(ROUNDS)]
            found[name] = sorted(runs, key=lambda run: run["seconds"])[ROUNDS // 2]
    rows = [
        (
            name,
            f"{run['seconds']:.2f} s",
            f"{run['peak_mb']:.0f} MB",
            f"{run['imports_mb']:.0f} MB",
            f"{run['span_mb']:.0f} MB",
        )
        for name, run in found.items()
    ]
    figures = {"gguf_s": found["gguf"]["seconds"], "gguf_peak_mb": found["gguf"]["peak_mb"]}
    figures |= {
        "safetensors_s": found["safetensors"]["seconds"],
        "safetensors_peak_mb": found["safetensors"]["peak_mb"],
    }
    figures |= {"span_mb": found["gguf"]["span_mb"], "imports_mb": found["gguf"]["imports_mb"]}
    report("A third of SmolLM2", rows, ("storage", "ready in", "peak memory", "of which imports", "the span"), figures)


if __name__ == "__main__":
    main()
