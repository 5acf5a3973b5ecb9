"""A peer on a GPU: `python -m tests.bench.gpu [--part NAME] --json`.

Parts: `block` (whole blocks beside their floors, and eager bfloat16), `extra` (a step of ten 70B-shaped blocks through
a whole peer, less the blocks, beside bare gRPC), `alone` and `sessions` (tokens a second of a model of SmolLM2's shape
through gRPC: one session, sixteen in four other processes). Peers are processes of their own, weights are random.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from petal.client.swarm import AsyncSwarmModel
from transformers import LlamaConfig, LlamaForCausalLM

from tests.bench.peer_extra import measured
from tests.bench.plain_block import plain_ms
from tests.gpu.__main__ import environment
from tests.gpu.served import PROMPTS

SESSIONS, PROCESSES = 16, 4
START_S = 180.0


def smollm2(folder: Path) -> Path:
    """A random model of SmolLM2-135M's shape."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(folder)
    return folder


@contextmanager
def peer(model: Path, *options: str) -> Iterator[str]:
    """The address of a peer process on the card."""
    with tempfile.TemporaryDirectory(prefix="petal-bench-") as folder:
        command = [sys.executable, "-m", "petal.peer", str(model), "--json", "--host", "127.0.0.1", *options]
        command += ["--device", "cuda", "--identity", f"{folder}/identity"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment()
        )
        try:
            yield _address(process)
        finally:
            process.terminate()
            process.wait(30)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line) if line.startswith("{") else {}
        if event.get("event") == "ready":
            return str(event["address"])
        if event.get("event") == "error":
            raise RuntimeError(event["message"])
    raise RuntimeError(f"the peer ended with {process.wait()}")


async def tokens_per_s(model: str, address: str, sessions: int, tokens: int, seed: int = 0) -> float:
    """Of `sessions` at a time, once they all decode."""
    client = await AsyncSwarmModel.connect(model, [address], codec="bf16")
    try:
        await client.generate(PROMPTS[0], max_new_tokens=8, drafter="none", eos_token_id=-1)
        gaps = await asyncio.gather(*(_gaps(client, seed + i, tokens) for i in range(sessions)))
    finally:
        await client.close()
    return sum(len(each) / sum(each) for each in gaps)


async def _gaps(client: AsyncSwarmModel, seed: int, tokens: int) -> list[float]:
    """Seconds between tokens, from the second on."""
    stamps, ids = [], PROMPTS[seed % len(PROMPTS)]
    async for _ in client.stream(ids, max_new_tokens=tokens, seed=seed, eos_token_id=-1, drafter="none"):
        stamps.append(time.perf_counter())
    return [b - a for a, b in pairwise(stamps[1:])]


def in_processes(model: Path, address: str, tokens: int) -> float:
    """Tokens a second of all sessions, in processes of their own."""
    each = SESSIONS // PROCESSES
    command = [sys.executable, "-m", "tests.bench.gpu", "--load", address, "--model", str(model)]
    command += ["--tokens", str(tokens), "--clients", str(each)]
    loads = [
        subprocess.Popen([*command, "--seed", str(each * i)], stdout=subprocess.PIPE, text=True, env=environment())
        for i in range(PROCESSES)
    ]
    return sum(float(load.communicate(timeout=START_S)[0].split()[-1]) for load in loads)


def served(parts: list[str], tokens: int) -> dict[str, Any]:
    """`alone` and `sessions`."""
    with tempfile.TemporaryDirectory(prefix="petal-bench-") as name:
        model = smollm2(Path(name) / "smollm2")
        figures: dict[str, Any] = {}
        with peer(model, "--quant", "none") as address:
            if "alone" in parts:
                runs = [asyncio.run(tokens_per_s(str(model), address, 1, tokens)) for _ in range(3)]
                figures["smollm2_tok_s"] = median(runs)
            if "sessions" in parts:
                runs = [in_processes(model, address, tokens) for _ in range(3)]
                figures["smollm2_16_sessions_tok_s"] = median(runs)
    return figures


def blocks() -> dict[str, Any]:
    """`block`: whole blocks over 1,024 tokens and a tree, beside torch's own in bfloat16."""
    parts = [word for part in ("block", "block-nf4", "block-8b") for word in ("--part", part)]
    command = [sys.executable, "-m", "tests.bench.kernels_cuda", "--json", *parts]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=START_S, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    names = {"block Int4": "block_int4_ms", "block Nf4": "block_nf4_ms"}
    figures: dict[str, Any] = {}
    for row in rows:
        name = names[row["format"]] + ("" if row["shape"] == "70B" else f"_{row['shape']}")
        figures.setdefault(name, {})[row["M"]] = round(row["ms"], 4)
    figures["block_bf16_torch_ms"] = {rows: round(plain_ms(rows), 4) for rows in (1, 16, 64, 256)}
    return figures


PARTS = ("block", "extra", "alone", "sessions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--load", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--clients", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(asyncio.run(tokens_per_s(options.model, options.load, options.clients, options.tokens, options.seed)))
        return
    parts = options.part or list(PARTS)
    figures: dict[str, Any] = {"card": torch.cuda.get_device_name()}
    if "block" in parts:
        figures |= blocks()
    if "extra" in parts:
        figures |= asyncio.run(measured("cuda"))
    if {"alone", "sessions"} & {*parts}:
        figures |= served(parts, options.tokens)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
