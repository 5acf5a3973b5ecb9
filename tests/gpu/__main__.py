"""All that needs a card, in one command: `python -m tests.gpu [GROUP ...]`, from the root of the repository.

It needs no package index and no installed Petal, but torch, Triton, transformers, pytest and platformdirs. Groups run
one after another, each in a process of its own with a limit of its own; one in which nothing passed has failed. The
last line is JSON: {"groups": {name: {"passed": n, "failed": n, "seconds": s}}, "bench": what the bench says}.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests/kernels/cuda"
# What a group runs, and the seconds that it may take; most of them are compilers'.
GROUPS = {
    "backend": ([f"{HERE}/test_backend.py", f"{HERE}/test_scores.py"], 120),
    "span": ([f"{HERE}/test_span.py"], 120),
    "peers": (["tests/gpu/test_peers.py"], 240),
    "drafter": (["tests/gpu/test_drafter.py"], 120),
    "attention": ([f"{HERE}/test_attention.py"], 240),
    "experts": ([f"{HERE}/test_experts.py", f"{HERE}/test_adapters.py"], 90),
    "products": ([f"{HERE}/test_linear.py"], 240),
}
BENCH = ("int4", "block")


def environment() -> dict[str, str]:
    """For processes that import from this repository, whose folders are the package where none is installed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if importlib.util.find_spec("petal") is None:
        folder = Path(tempfile.mkdtemp(prefix="petal-package-"))
        (folder / "petal").symlink_to(ROOT, target_is_directory=True)
        paths.append(str(folder))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def pytest_command(files: list[str]) -> list[str]:
    """Without the repository's own options, which ask for plugins that are not needed here."""
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "-q", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    return [*command, "-o", "markers=cuda: needs a GPU", "-m", "cuda", *files]


def counts(output: str) -> dict[str, int]:
    """What pytest's last line says: {"passed": 53, "failed": 1}; errors are failures."""
    last = next((line for line in reversed(output.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "")
    found = {word.removesuffix("s"): int(n) for n, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}
    return {"passed": found.get("passed", 0), "failed": found.get("failed", 0) + found.get("error", 0)}


def run(command: list[str], limit: float, settings: dict[str, str]) -> tuple[str, bool]:
    """Its output, and whether it ended in time and well."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=settings, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        output = error.output or b""
        return output.decode(errors="replace") if isinstance(output, bytes) else output, False
    return done.stdout, done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    known = ", ".join([*GROUPS, "bench"])
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {known}; all by default")
    chosen = parser.parse_args().groups or [*GROUPS, "bench"]
    if unknown := sorted(set(chosen) - {*GROUPS, "bench"}):
        parser.error(f"there is no group {unknown[0]}")
    report: dict[str, object] = {}
    broken = False
    groups: dict[str, dict[str, float]] = {}
    settings = environment()
    for name in [name for name in chosen if name in GROUPS]:
        files, limit = GROUPS[name]
        start = time.perf_counter()
        output, well = run(pytest_command(files), limit, settings)
        groups[name] = counts(output) | {"seconds": round(time.perf_counter() - start, 1)}
        if not well:
            print("\n".join(line[:200] for line in output.splitlines()[-60:]))
        if not (well and groups[name]["passed"]):
            groups[name]["failed"] = max(1, groups[name]["failed"])  # late, or nothing ran
        print(f"{name}: {groups[name]}", flush=True)
    if "bench" in chosen:
        parts = [word for part in BENCH for word in ("--part", part)]
        output, well = run([sys.executable, "-m", "tests.bench.kernels_cuda", "--json", *parts], 180, settings)
        last = (output.splitlines() or [""])[-1]
        report["bench"], broken = (json.loads(last), False) if well else ({"failed": last}, True)
        print(output if well else output[-2000:])
    print(json.dumps({"groups": groups, **report}))
    return int(broken or any(group["failed"] for group in groups.values()))


if __name__ == "__main__":
    sys.exit(main())
