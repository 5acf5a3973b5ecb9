"""What `petal swarm status` counts and shows."""

from __future__ import annotations

import io

import pytest
from petal.client.cli.status import _model, print_status
from petal.protocol import petal_pb2 as pb
from petal.protocol.directory.directory import Pong
from rich.console import Console


def record(name: str, start: int, end: int, quantization: str = "none", dtype: str = "float32") -> pb.PeerRecord:
    return pb.PeerRecord(
        peer_id=f"Qm-a-long-identity-{name}",
        model="some/model-of-some-length",
        n_blocks=30,
        start=start,
        end=end,
        addresses=["192.168.178.123:45123"],
        state=pb.ONLINE,
        dtype=dtype,
        quantization=quantization,
        throughput=1234.0,
        cache_tokens=16384,
        cache_tokens_free=16384,
        max_sessions=64,
    )


def report(*records: pb.PeerRecord) -> dict:
    return {"models": [_model(list(records), {r.peer_id: Pong(r.peer_id, pb.ONLINE, 0.0123) for r in records})]}


def printed(said: dict, width: int) -> str:
    out = io.StringIO()
    print_status(said, Console(file=out, width=width, color_system=None))
    return out.getvalue()


SPLIT = report(record("AAAAAAAA", 0, 15), record("BBBBBBBB", 15, 30, "gguf", "bf16"))


def test_blocks_count_only_where_one_route_can_take_them() -> None:
    [model] = SPLIT["models"]
    assert (model["covered"], model["missing"]) == (15, [[15, 30]])
    assert {p["profile"]: p["missing"] for p in model["profiles"]} == {
        "float32": [[15, 30]],
        "gguf (bf16)": [[0, 15]],
    }
    text = printed(SPLIT, 100)
    assert "are covered" not in text
    assert "blocks 0-14 have no reachable peer in gguf (bf16)" in text
    assert "--allow-mixed" in text
    whole = report(record("AAAAAAAA", 0, 15), record("BBBBBBBB", 15, 30))
    assert "all 30 blocks are covered" in printed(whole, 80)


@pytest.mark.parametrize("width", [60, 80, 100, 150])
def test_tables_fold_by_dropping_columns(width: int) -> None:
    lines = printed(SPLIT, width).splitlines()
    rows = [line for line in lines if "192.168.178.123:45123" in line]
    assert len(rows) == 2, lines
    assert all(len(line) <= width for line in rows)
    assert all("gguf" in row or "float32" in row for row in rows) == (width >= 70)
