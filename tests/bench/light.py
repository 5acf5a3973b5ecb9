"""How soon a client without torch and hivemind says its first token: `python -m tests.bench.light --json`.

From the start of its process, with the checkpoint opened and the tokenizer built, at a running peer of SmolLM2 on this
machine. `import_s` is what `python -X importtime` says of petal.client alone, the rest is of the same processes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from .swarm import PROMPT, peer_processes, report

ROOT = Path(__file__).parent.parent.parent
# Clocks of two processes of one machine agree.
CLIENT = """
import json, sys, time
began = time.time()
from tests.support.light_client import PEERS_NEED, hide
hide(PEERS_NEED)
from petal.client import SwarmModel
from petal.client.routing import connect
imported = time.time()
open_directory = connect.open_directory
def stamped(peers, trust):
    global opened
    opened = time.time()
    return open_directory(peers, trust)
connect.open_directory = stamped
with SwarmModel.connect("demo", [sys.argv[1]]) as model:
    connected = time.time()
    next(iter(model.stream(sys.argv[2])))
    said, cpu_s = time.time(), time.process_time()
print(json.dumps([began, imported, opened, connected, said, cpu_s]))
"""
BARS = {"import_s": 0.4, "first_token_s": 1.5}


def start(address: str) -> dict[str, float]:
    """Seconds of one client, from the start of its process."""
    began = time.time()
    command = [sys.executable, "-c", CLIENT, address, PROMPT]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *stamps, cpu_s = json.loads(done.stdout)
    parts = ("interpreter_s", "imports_s", "checkpoint_s", "directory_s", "generation_s")
    spent = {name: after - before for name, (before, after) in zip(parts, pairwise([began, *stamps]), strict=True)}
    return {**spent, "first_token_cpu_s": cpu_s, "first_token_s": stamps[-1] - began}


def import_time() -> float:
    """Seconds that `python -X importtime` gives for petal.client."""
    command = [sys.executable, "-X", "importtime", "-c", "import petal.client"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    [line] = re.findall(r"\| +(\d+) \| petal\.client$", done.stderr, re.MULTILINE)
    return int(line) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with peer_processes(1) as (address, _):
        start(address)
        runs = [start(address) for _ in range(options.rounds)]
    figures = {name: median(run[name] for run in runs) for name in runs[0]}
    figures["import_s"] = median(import_time() for _ in range(options.rounds))
    rows = [(name, f"{value:.3f}", f"{BARS[name]}" if name in BARS else "") for name, value in figures.items()]
    report("A client without torch, from its start to its first token", rows, ("what", "seconds", "at most"), figures)


if __name__ == "__main__":
    main()
