"""The programs as people meet them: one-line errors and exit codes, and a peer that comes and goes cleanly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ..support.commands import petal, petal_serve, serve
from ..support.tiny import tiny_llama

BIN = Path(sys.executable).parent
NOBODY = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.delenv("PETAL_INITIAL_PEERS", raising=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer: one token a byte."""
    folder = shutil.copytree(tiny_llama(), tmp_path_factory.mktemp("model") / "tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return folder


# petal-serve refuses.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--blocks", "5"], "half-open range such as 0:10"),
        (["--blocks", "3:1"], "half-open range"),
        (["--blocks", "a:b"], "half-open range"),
        (["--num-blocks", "0"], "--num-blocks"),
        (["--cache-tokens", "1"], "--cache-tokens"),
        (["--device", "abacus"], "abacus"),
        (["--dtype", "float64"], "float32 or bf16"),
        (["--nonsense"], "No such option"),
    ],
    ids=str,
)
def test_serve_usage_errors_exit_with_2(options: list[str], words: str, tmp_path: Path) -> None:
    assert words in serve(tiny_llama(), *options, tmp_path=tmp_path).line("petal-serve", code=2)


@pytest.mark.parametrize("name", ["nobody/such-model", "/no/such/folder", "no-such.gguf"])
def test_serve_names_a_model_it_cannot_open(name: str, tmp_path: Path) -> None:
    assert name in serve(name, tmp_path=tmp_path).line("petal-serve")


def test_serve_names_the_blocks_that_there_are(tmp_path: Path) -> None:
    line = serve(tiny_llama(), "--blocks", "2:9", tmp_path=tmp_path).line("petal-serve")
    assert "--blocks 2:9" in line
    assert "blocks 0:4" in line


def test_serve_says_that_the_port_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = serve(tiny_llama(), "--port", port, tmp_path=tmp_path).line("petal-serve")
    assert f"127.0.0.1:{port}" in line
    assert "in use" in line


@pytest.mark.parametrize("peer", ["127.0.0.1:1", NOBODY], ids=["grpc", "libp2p"])
def test_serve_without_a_reachable_swarm_says_so(peer: str, tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    serve(tiny_llama(), "--initial-peers", peer, tmp_path=tmp_path).line("petal-serve")
    left = [child for child in psutil.Process().children(recursive=True) if child not in before]
    assert not [child for child in left if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def test_serve_says_which_identity_file_it_cannot_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    line = serve(tiny_llama(), "--identity", tmp_path / "file" / "id", tmp_path=tmp_path).line("petal-serve")
    assert "file" in line


def gguf(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


HEADER = b"GGUF" + struct.pack("<IQQ", 3, 5, 1)
KEY = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"


@pytest.mark.parametrize(
    "data",
    [b"", b"GGU", b"PK\3\4 zip", HEADER, HEADER + KEY, HEADER + b"\xff" * 400, b"GGUF" + b"\xff" * 400],
    ids=["empty", "short", "another format", "no metadata", "no tensors", "garbage", "huge counts"],
)
def test_serve_refuses_a_corrupt_gguf(data: bytes, tmp_path: Path) -> None:
    assert "model.gguf" in serve(gguf(tmp_path, data), tmp_path=tmp_path).line("petal-serve")


def spoil(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    spoilt = {
        "empty": b"",
        "short header": data[: size // 2],
        "huge header": struct.pack("<Q", 1 << 62) + data[8:],
        "garbage header": data[:8] + b"\xff" * size + data[8 + size :],
        "truncated data": data[:-1000],
    }
    weights.write_bytes(spoilt[kind])


@pytest.mark.parametrize("kind", ["empty", "short header", "huge header", "garbage header", "truncated data"])
def test_serve_refuses_corrupt_safetensors(kind: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama(), tmp_path / "spoilt")
    spoil(folder, kind)
    assert "model.safetensors" in serve(folder, tmp_path=tmp_path).line("petal-serve")


@pytest.mark.parametrize("config", ["", "[]", "{}", '{"model_type": "no_such_family"}'])
def test_serve_refuses_a_config_that_is_none(config: str, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama(), tmp_path / "spoilt")
    (folder / "config.json").write_text(config)
    serve(folder, tmp_path=tmp_path).line("petal-serve")


# petal.


def test_generate_asks_for_a_peer(model: Path) -> None:
    assert "name at least one peer" in petal("generate", model, "Hi").line("petal")


@pytest.mark.parametrize("peer", ["127.0.0.1:1", "no.such.host.invalid:80"])
def test_generate_names_peers_that_do_not_answer(model: Path, peer: str) -> None:
    assert peer in petal("generate", model, "Hi", "--initial-peers", peer).line("petal")


def test_errors_are_no_markup(model: Path) -> None:
    assert "[/red]" in petal("generate", model, "Hi", "--initial-peers", "[/red]:1").line("petal", code=2)


def test_status_asks_for_a_peer() -> None:
    assert "name at least one peer" in petal("swarm", "status").line("petal")


def test_usage_errors_exit_with_2(model: Path) -> None:
    for arguments in (["generate"], ["generate", model, "Hi", "--max-new-tokens", 0], ["swarm", "nonsense"]):
        petal(*arguments).line("petal", code=2)


# Real processes.


class Peer:
    """A `petal-serve --json` process."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        program = [BIN / "petal-serve", *arguments, "--host", "127.0.0.1", "--threads", 1, "--json"]
        self.process = subprocess.Popen(
            [str(part) for part in program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self.events: list[dict[str, Any]] = []
        self.ready = self.until("ready")

    def until(self, event: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]
        raise AssertionError(f"no {event} event: {self.events}")

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def interrupt(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        with self.process:  # closes the pipe, too
            return self.process.wait(60)  # busy machines


@pytest.fixture(scope="module")
def peers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Peer]]:
    """A peer with the whole model, and one with its last block."""
    folder = tmp_path_factory.mktemp("peers")
    running = [Peer(model, "--identity", folder / "a")]
    try:
        first = running[0].ready["address"]
        running.append(Peer(model, "--identity", folder / "b", "--blocks", "3:4", "--initial-peers", first))
        yield running
    finally:
        for peer in running:
            if peer.process.poll() is None:
                peer.interrupt()
            peer.process.stdout.close()


def test_ready_line_says_all_that_a_program_needs(peers: list[Peer], model: Path) -> None:
    ready = peers[1].ready
    assert ready["blocks"] == [3, 4]
    assert ready["model"] == model.name
    assert ready["address"] == f"127.0.0.1:{ready['port']}"
    assert ready["multiaddrs"]
    assert ready["peer_id"] in ready["multiaddrs"][0]
    assert ready["tokens_per_s"] > 0
    assert {"stage", "loading"} <= {event["event"] for event in peers[1].events}


def test_generate_answers(peers: list[Peer], model: Path) -> None:
    address = peers[0].ready["address"]
    command = ("generate", model, "Hi there", "--initial-peers", address, "--max-new-tokens", 4, "--raw", "--json")
    ran = petal(*command)
    assert ran.code == 0
    answer = json.loads(ran.out)
    assert len(answer["ids"]) <= 4
    assert answer["finish_reason"] in ("length", "stop")
    assert petal(*command).out.split('"seconds"')[0] == ran.out.split('"seconds"')[0]


@pytest.mark.parametrize("raw", [["--raw"], []], ids=["raw", "chat"])
def test_generate_refuses_a_prompt_longer_than_the_context(peers: list[Peer], model: Path, raw: list[str]) -> None:
    for letters in (513, 6000):
        address = peers[0].ready["address"]
        line = petal("generate", model, "x" * letters, "--initial-peers", address, *raw).line("petal")
        assert f"{letters} tokens" in line
        assert "512 positions" in line


def test_generate_of_a_model_that_nobody_serves(peers: list[Peer], model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model, tmp_path / "other one")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5000.0}))
    line = petal("generate", other, "Hi", "--initial-peers", peers[0].ready["address"]).line("petal")
    assert f"no peer serves other one; start one with `petal-serve '{other}'`" in line
    assert "other" in line


def test_generate_refuses_bad_sampling(peers: list[Peer], model: Path) -> None:
    options = ("--initial-peers", peers[0].ready["address"], "--temperature", 1, "--top-p", 2)
    assert "top_p is above 0 and at most 1" in petal("generate", model, "Hi", *options).line("petal")


def states(peers: list[Peer], expected: dict[str, str]) -> dict[str, str]:
    """State of every peer as the first one knows them, once it is as expected: news takes a while to come round."""
    end = time.monotonic() + 18  # a record lives 20 s at least: by then only a withdrawn one is gone
    while True:
        ran = petal("swarm", "status", "--initial-peers", peers[0].ready["address"], "--json")
        assert ran.code == 0
        [model] = json.loads(ran.out)["models"]
        found = {peer["peer_id"]: peer["state"] for peer in model["peers"]}
        if found == expected or time.monotonic() > end:
            return found


def test_status_shows_every_peer_even_one_that_hangs(peers: list[Peer]) -> None:
    names = [peer.ready["peer_id"] for peer in peers]
    command = ("swarm", "status", "--initial-peers", peers[0].ready["address"])
    expected = dict.fromkeys(names, "online")
    assert states(peers, expected) == expected
    table = petal(*command).output
    assert "all 4 blocks are covered" in table
    assert all(name[-8:] in table for name in names)
    peers[1].process.send_signal(signal.SIGSTOP)
    try:
        expected[names[1]] = "unreachable"
        assert states(peers, expected) == expected
        assert "unreachable" in petal(*command).output
    finally:
        peers[1].process.send_signal(signal.SIGCONT)


def test_a_second_peer_of_one_identity_is_refused(peers: list[Peer], model: Path) -> None:
    identity = peers[0].arguments[2]
    line = petal_serve(model, "--host", "127.0.0.1", "--identity", identity).line("petal-serve")
    assert f"another peer of this machine runs as {identity}" in line
    assert "--identity" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["Ctrl-C", "closed terminal"])
def test_a_peer_that_is_told_to_end_withdraws_and_leaves_nothing_behind(
    peers: list[Peer], model: Path, number: int
) -> None:
    """Runs last in this file: afterwards only the first peer is left, at the port and with the id that it had."""
    former = peers[1].ready
    if peers[1].process.poll() is not None:
        peers[1] = Peer(*peers[1].arguments)
        assert (peers[1].ready["address"], peers[1].ready["multiaddrs"]) == (former["address"], former["multiaddrs"])
    children = peers[1].children()
    assert children, "the DHT daemon is a child process"
    assert peers[1].interrupt(number) == 0
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    expected = {peers[0].ready["peer_id"]: "online"}
    assert states(peers, expected) == expected
