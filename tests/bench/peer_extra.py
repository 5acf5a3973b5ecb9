"""What a whole peer adds to its blocks: ten 70B-shaped int4 blocks on a card behind gRPC, beside bare gRPC.

The peer is in this process, its client and the bare echo in others. A step brings embeddings in bf16 and takes hidden
states away, 1 row or 60 (what one frame carries). Weights are zeros, of a file that takes no room: a product takes the
same time whatever it multiplies.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from statistics import median
from typing import Any

import grpc
import torch
import uvloop
from petal.peer.engine.engine import Engine
from petal.peer.engine.runner import Segment
from petal.protocol import petal_pb2 as pb
from petal.protocol.trust.identity import Identity
from petal.protocol.trust.trust import PublicTrust
from petal.protocol.wire.limits import SERVER_OPTIONS
from petal.protocol.wire.tree import chain

from tests.gpu.__main__ import environment
from tests.support.swarms import local_swarm, spans
from tests.support.wire import ListedPeer, RawSession, Wire

BLOCKS, WIDTH, INNER, HEADS, KV_HEADS = 10, 8192, 28672, 64, 8
ROWS = (1, 60)
CONTEXT = 64
STEPS, WARM_UP = 300, 30
METHOD = "/bare/Echo"


def sparse_model(
    folder: Path, blocks: int = BLOCKS, width: int = WIDTH, inner: int = INNER, heads: int = HEADS
) -> Path:
    """A checkpoint of int4 blocks, all zeros, as a file with a hole."""
    folder.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 256, "hidden_size": width,
        "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": KV_HEADS, "head_dim": width // heads, "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        "quantization_config": {"quant_method": "petal", "format": "int4"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {}
    at = 0

    def add(name: str, kind: str, *shape: int) -> None:
        nonlocal at
        size = shape[0] * (shape[1] if len(shape) > 1 else 1) * {"U8": 1, "F16": 2, "BF16": 2}[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size

    def matrix(name: str, out: int, depth: int) -> None:
        add(f"{name}.codes", "U8", out, depth // 2)
        add(f"{name}.scales", "F16", out, depth // 64)
        add(f"{name}.zeros", "U8", out, depth // 64)

    keys = width // heads * KV_HEADS
    shapes = {"q": (width, width), "k": (keys, width), "v": (keys, width), "o": (width, width)}
    gated = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    for block in range(blocks):
        path = f"model.layers.{block}"
        for name, shape in shapes.items():
            matrix(f"{path}.self_attn.{name}_proj", *shape)
        for name, shape in gated.items():
            matrix(f"{path}.mlp.{name}_proj", *shape)
        for name in ("input", "post_attention"):
            add(f"{path}.{name}_layernorm.weight", "BF16", width)
    for name in ("model.embed_tokens", "lm_head"):
        add(f"{name}.weight", "BF16", 256, width)
    add("model.norm.weight", "BF16", width)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    return folder


def payload(rows: int, width: int) -> bytes:
    data = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows)).bfloat16().view(torch.int16).numpy()
    return bytes(data.tobytes())


async def drive(address: str, width: int) -> dict[int, float]:
    """Median milliseconds of a step at the client, by rows."""
    found = {}
    async with Wire(await ListedPeer.at(address)) as wire:
        session, _ = await wire.session(codec=pb.BF16, reserve_tokens=256)
        step = 1
        await session.step(step, embeddings=payload(CONTEXT // 2, width), prefill=True, want=pb.Want(hidden=True))
        await answered(session)
        pending: list[int] = []
        for rows in ROWS:
            times, data = [], payload(rows, width)
            for _ in range(WARM_UP + STEPS):
                step += 1
                started = time.perf_counter()
                await session.step(
                    step, base=CONTEXT // 2, commit=pending, rewind=CONTEXT // 2 if pending else None, embeddings=data,
                    parents=range(-1, rows - 1), want=pb.Want(hidden=True),
                )  # fmt: skip
                received = await answered(session)
                times.append((time.perf_counter() - started) * 1e3)
                assert received == len(data)
                pending = [0]
            found[rows] = median(times[WARM_UP:])
    return found


async def answered(session: RawSession) -> int:
    """Bytes of hidden states that came; credits pass by."""
    received = 0
    while True:
        result = (await session.read()).result
        received += len(result.hidden)
        if result.last_part:
            return received


async def echo() -> None:
    """A server of nothing but gRPC: says where it is, and sends back what comes."""
    trust = PublicTrust(Identity.ephemeral())

    async def stream(requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        async for frame in requests:
            yield frame

    handler = grpc.method_handlers_generic_handler("bare", {"Echo": grpc.stream_stream_rpc_method_handler(stream)})
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_secure_port("127.0.0.1:0", trust.server_credentials())
    await server.start()
    print(f"127.0.0.1:{port}", trust.certificates[0].hex(), flush=True)
    await server.wait_for_termination()


async def bare(width: int) -> dict[int, float]:
    """Median milliseconds in and out, by rows."""
    server = await _process("echo")
    assert server.stdout
    address, certificate = (await server.stdout.readline()).decode().split()
    record, found = pb.PeerRecord(certificates=[bytes.fromhex(certificate)]), {}
    async with PublicTrust().channel(record, address) as channel:
        call = channel.stream_stream(METHOD)()
        for rows in ROWS:
            times, data = [], payload(rows, width)
            for _ in range(WARM_UP + STEPS):
                started = time.perf_counter()
                await call.write(data)
                await call.read()
                times.append((time.perf_counter() - started) * 1e3)
            found[rows] = median(times[WARM_UP:])
        call.cancel()
    server.terminate()
    await server.wait()
    return found


async def _process(*arguments: str) -> asyncio.subprocess.Process:
    command = (sys.executable, "-m", "tests.bench.peer_extra", *arguments)
    return await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, env=environment())


async def measured(device: str, **shape: int) -> dict[str, Any]:
    """`peer_extra_ms` by rows, with what it is made of."""
    width = shape.get("width", WIDTH)
    with tempfile.TemporaryDirectory(prefix="petal-bench-") as name:
        model = sparse_model(Path(name) / "sparse", **shape)
        blocks = shape.get("blocks", BLOCKS)
        async with local_swarm(model, spans(blocks, 1), device=device, quant="int4", cache_tokens=4096) as swarm:
            peer = swarm.peers[0]
            client = await _process("drive", swarm.address, str(width))
            assert client.stdout
            whole = json.loads(await client.stdout.read())
            inside = {rows: await on_compute(peer.engine, rows, width) for rows in ROWS}
        client = await _process("bare", str(width))
        assert client.stdout
        floor = json.loads(await client.stdout.read())
    figures = {}
    for rows in ROWS:
        step, bare_ms = whole[str(rows)], floor[str(rows)]
        figures[str(rows)] = {
            "step_ms": step, "blocks_ms": inside[rows], "peer_extra_ms": step - inside[rows], "bare_grpc_ms": bare_ms,
            "bar_ms": 1.3 * bare_ms + 0.1,
        }  # fmt: skip
    return {"peer_extra": figures}


async def on_compute(engine: Engine, rows: int, width: int) -> float:
    """`blocks_ms`, on the thread that owns the cache."""
    loop = asyncio.get_running_loop()
    found: asyncio.Future[float] = loop.create_future()
    engine.call(lambda: loop.call_soon_threadsafe(found.set_result, blocks_ms(engine, rows, width)))
    return await found


def blocks_ms(engine: Engine, rows: int, width: int) -> float:
    """Of the blocks alone, as the peer runs them: many forwards in a row, of which the host waits for the last."""
    runner, cache, span = engine._runner, engine.cache, engine.span
    table, data = cache.open(), torch.zeros(rows, width, dtype=span.backend.stream, device=span.backend.device)

    def forward() -> torch.Tensor:
        table.pending = 0
        [hidden] = runner.run([Segment(table, data, chain(rows), range(span.start, span.end))])
        return hidden

    for _ in range(5):
        forward().cpu()
    started = time.perf_counter()
    for _ in range(50):
        hidden = forward()
    hidden.cpu()
    ms = (time.perf_counter() - started) / 50 * 1e3
    cache.release(table)
    return ms


def main() -> None:
    role, *rest = sys.argv[1:]
    if role == "echo":
        uvloop.run(echo())
    elif role == "drive":
        print(json.dumps(uvloop.run(drive(rest[0], int(rest[1])))))
    elif role == "bare":
        print(json.dumps(uvloop.run(bare(int(rest[0])))))
    else:
        device, *numbers = rest
        shape = dict(zip(("blocks", "width", "inner", "heads"), map(int, numbers), strict=False))
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")
        print(json.dumps(uvloop.run(measured(device, **shape))))


if __name__ == "__main__":
    main()
