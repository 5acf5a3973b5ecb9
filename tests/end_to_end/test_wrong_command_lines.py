"""Command lines as people mistype them: one line that says what to do, an exit code, never a stack trace."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ..support.commands import Ran, petal, petal_serve
from ..support.tiny import tiny_llama

DHT = "/ip4/127.0.0.1/tcp/1/p2p/QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
HELP = "--help` shows what there is"
Case = tuple[str, int, str]  # the command line, its exit code, and what its line says

ADDRESSES = [
    ("host:99999", "ports are numbers from 1 to 65535"),
    ("host:0", "ports are numbers from 1 to 65535"),
    ("host:port", "ports are numbers from 1 to 65535"),
    ("localhost", "has no port; give host:port"),
    ("''", "an address is empty; give host:port"),
    ("garbage", "has no port; give host:port"),
    ("http://127.0.0.1:8080/", "web address; give host:port alone, such as 127.0.0.1:8080"),
    ("https://example.org", "web address; give host:port alone"),
    ("a:1,b:2", "name several peers by giving the option several times"),
    ("::1:31337", "in brackets, such as [2001:db8::7]:31337"),
    ("/ip4/1.2.3.4/tcp/1", "is no multiaddr such as /ip4/1.2.3.4/tcp/31337/p2p/Qm…; paste the whole of it"),
    ("/tmp", "is no multiaddr"),
]
NUMBERS = ["x", "''", "1e3", "0x10", "1.5", "nan", "-1"]

SERVE: list[Case] = [
    *((f"serve MODEL --initial-peers {address}", 2, words) for address, words in ADDRESSES),
    *((f"serve MODEL --port {number}", 2, "'--port'") for number in [*NUMBERS, "65536", "80000"]),
    *((f"serve MODEL --dht-port {number}", 2, "'--dht-port'") for number in [*NUMBERS, "65536"]),
    *((f"serve MODEL --threads {number}", 2, "'--threads'") for number in [*NUMBERS, "0", "10000"]),
    *((f"serve MODEL --num-blocks {number}", 2, "'--num-blocks'") for number in [*NUMBERS, "0"]),
    *((f"serve MODEL --cache-tokens {number}", 2, "'--cache-tokens'") for number in [*NUMBERS, "0", "15"]),
    *((f"serve MODEL --max-sessions {number}", 2, "'--max-sessions'") for number in ("0", "-1", "x", "9999999")),
    *((f"serve MODEL --grace {number}", 2, "'--grace'") for number in ("-1", "x", "1e9")),
    *((f"serve MODEL --replay-mib {number}", 2, "'--replay-mib'") for number in ("-1", "x")),
    *(
        (f"serve MODEL --blocks {span}", 2, "give a half-open range such as 0:10")
        for span in ("0-10", "0..10", "10", "10:0", "3:3", ":", "0:", ":5", "a:b", "-1:4", "0:10:2", "٠:٣")
    ),
    ("serve MODEL --blocks 2:9", 1, "which has blocks 0:4"),
    ("serve MODEL --num-blocks 500", 1, "more than the 4 blocks of tiny"),
    ("serve MODEL --blocks 0:2 --num-blocks 2", 2, "contradict each other; give one of them"),
    ("serve MODEL --join x --initial-peers a:1", 2, "leave --initial-peers out"),
    ("serve MODEL --join x --relay", 2, "leave --relay out"),
    ("serve MODEL --join nonsense", 1, "neither a token nor a file that holds one"),
    *((f"serve MODEL --announce {word}", 2, "'--announce'") for word in ("nonsense", "a:0", "http://a:1", "''", DHT)),
    *((f"serve MODEL --host {host}", 2, "give one of its IP addresses") for host in ("no.such.host", "300.1.1.1")),
    ("serve MODEL --host 192.0.2.77", 1, "this machine has no such address"),
    ("serve MODEL --device cuba", 2, "there is no device 'cuba'; choose"),
    ("serve MODEL --device cpu:1", 2, "there is no device 'cpu:1'; choose"),
    ("serve MODEL --device cuda:x", 2, "there is no device 'cuda:x'; choose"),
    ("serve MODEL --device cuda:97", 1, "the device 'cuda:97' cannot be used here: "),
    ("serve MODEL --device mps", 1, "the device 'mps' cannot be used here: "),
    ("serve MODEL --gpu-memory 1.5", 2, "--gpu-memory"),
    ("serve MODEL --dtype bfloat16", 2, "there is no dtype 'bfloat16'; choose float32 or bf16"),
    ("serve MODEL --dtype float64", 2, "choose float32 or bf16"),
    ("serve MODEL --quant q4", 2, "there is no weight format 'q4'; choose none or int8"),
    ("serve MODEL --quant gguf", 1, "does not store gguf weights: choose --quant"),
    ("serve MODEL --quotas no-such-file", 2, "--quotas: no-such-file: No such file or directory; check the path"),
    ("serve MODEL --quotas .", 2, "--quotas: .: Is a directory; name a file, not a folder"),
    ("serve MODEL --quotas BADQUOTAS", 2, "--quotas: "),
    ("serve MODEL --quotas EMPTY", 2, "--quotas: "),
    ("serve MODEL --identity EMPTY", 1, "restore it from a backup, or delete it"),
    ("serve MODEL --identity EMPTY/below", 1, "File exists; name another place"),
    ("serve MODEL --cache-tokens 1000000000", 1, "ask for at most"),
    ("serve MODEL --nonsense", 2, HELP),
    ("serve MODEL --blokcs 0:4", 2, "--blocks"),
    ("serve MODEL --port", 2, HELP),
    ("serve MODEL extra", 2, "unexpected extra argument"),
    ("serve", 2, "Missing argument"),
    ("serve ''", 2, "give a hub id, a folder, a GGUF file, or demo"),
    ("serve dmeo", 1, "give a path, org/name, or demo"),
    ("serve no-such.gguf", 1, "give a path, org/name, or demo"),
    ("serve /no/such/folder", 1, "give a path, org/name, or demo"),
    ("serve nobody/such-model", 1, "nobody/such-model"),
    ("serve EMPTY", 1, "neither a .gguf nor a .safetensors file"),
    ("serve MODEL --initial-peers 127.0.0.1:1", 1, "check the address, or name another"),
    ("serve MODEL --initial-peers no.such.host.invalid:80", 1, "check the address, or name another"),
    ("serve MODEL --initial-peers WEB", 1, "check the address, or name another"),
    ("serve MODEL --port TAKEN", 1, "the port is in use; choose another --port"),
]

GENERATE: list[Case] = [
    *((f"generate MODEL Hi --initial-peers {address}", 2, words) for address, words in ADDRESSES),
    *((f"chat MODEL --initial-peers {address}", 2, words) for address, words in ADDRESSES[:4]),
    *((f"swarm status --initial-peers {address}", 2, words) for address, words in ADDRESSES),
    *((f"route MODEL --initial-peers {address}", 2, words) for address, words in ADDRESSES[:4]),
    *((f"generate MODEL Hi --max-new-tokens {number}", 2, "'--max-new-tokens'") for number in [*NUMBERS, "0"]),
    *((f"generate MODEL Hi --seed {number}", 2, "'--seed'") for number in ("x", "-1", "1.5")),
    *((f"generate MODEL Hi --top-k {number}", 2, "'--top-k'") for number in ("x", "-1")),
    *((f"generate MODEL Hi --temperature {number}", 2, "'--temperature'") for number in ("x", "-1")),
    *((f"generate MODEL Hi --budget {number}", 2, "'--budget'") for number in ("x", "-1")),
    *((f"generate MODEL Hi --wait {number}", 2, "'--wait'") for number in ("x", "-1")),
    ("generate MODEL Hi --drafter ngarm", 2, "there is no drafter 'ngarm'; did you mean ngram?"),
    ("generate MODEL Hi --drafter xyz", 2, "choose auto, ngram, model, none, a path or a hub id"),
    ("generate MODEL ''", 2, "the prompt is empty; say something"),
    ("generate MODEL Hi", 1, "name at least one peer"),
    ("generate dmeo Hi --initial-peers 127.0.0.1:1", 1, "give a path, org/name, or demo"),
    ("generate MODEL Hi --initial-peers 127.0.0.1:1", 1, "check the addresses"),
    ("generate MODEL Hi --initial-peers no.such.host.invalid:80", 1, "check the addresses"),
    ("generate MODEL Hi --initial-peers WEB", 1, "check the addresses"),
    ("generate MODEL Hi --join nonsense", 1, "neither a token nor a file that holds one"),
    ("generate MODEL Hi --join x --initial-peers a:1", 1, "leave initial_peers out"),
    ("generate MODEL Hi --exact --allow-mixed --initial-peers 127.0.0.1:1", 1, "contradict each other"),
    ("generate", 2, "Missing argument"),
    ("generate MODEL Hi there", 2, "unexpected extra argument"),
    ("generate MODEL Hi --temprature 1", 2, "--temperature"),
    ("chat", 2, "Missing argument"),
    ("chat MODEL", 1, "name at least one peer"),
    ("chat MODEL Hi", 2, "unexpected extra argument"),
    ("route MODEL", 1, "name at least one peer"),
    ("gernerate MODEL Hi", 2, "generate"),
    ("swarm nonsense", 2, HELP),
    ("swarm status", 1, "name at least one peer"),
    ("swarm status --initial-peers 127.0.0.1:1", 1, "check the addresses"),
    ("swarm init", 2, "Missing argument"),
    ("swarm init a/b", 1, "at most 64 letters, digits, - and _ are allowed"),
    ("swarm init lab --address nonsense", 1, "'nonsense' has no port; give host:port"),
    ("swarm init lab --address a:65535", 1, "give one below 65535"),
    ("swarm invite", 1, "`petal swarm init"),
    ("swarm invite nobody", 1, "`petal swarm init nobody` makes a new swarm"),
    ("swarm admin nobody", 1, "`petal swarm init nobody` makes a new swarm"),
    ("swarm admin --join nonsense", 1, "neither a token nor a file that holds one"),
    ("swarm members nobody", 1, "`petal swarm init nobody` makes a new swarm"),
    ("swarm revoke abc", 1, "`petal swarm init"),
    ("swarm rotate nobody", 1, "`petal swarm init nobody` makes a new swarm"),
    ("swarm leave nobody", 1, "`petal swarm list`"),
    ("demo --peers 0", 2, "'--peers'"),
    ("demo --peers 31", 2, "'--peers'"),
    ("demo --drafter magic", 2, "there is no drafter 'magic'"),
    ("distill", 2, "Missing argument"),
    ("distill MODEL", 2, "Missing option"),
]


@pytest.fixture(scope="module")
def web_server() -> Iterator[str]:
    """Answers everybody as a web server would."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def answer() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    client.recv(4096)
                    client.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def words(tmp_path: Path, web_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """What the capitals stand for."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("PETAL_INITIAL_PEERS", "PETAL_JOIN"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "empty").touch()
    (tmp_path / "quotas").write_text('{"quotas": [{"session": 4}]}')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield {
            "MODEL": str(tiny_llama()),
            "EMPTY": str(tmp_path / "empty"),
            "BADQUOTAS": str(tmp_path / "quotas"),
            "WEB": web_server,
            "TAKEN": str(taken.getsockname()[1]),
            "''": "",
        }


def ran(line: str, words: dict[str, str], tmp_path: Path) -> tuple[str, Ran]:
    arguments = []
    for part in line.split():
        head, slash, rest = part.partition("/below")
        arguments.append(words.get(head, head) + slash + rest)
    if arguments[0] != "serve":
        return "petal", petal(*arguments)
    given = set(arguments)
    rest = [] if "--host" in given else ["--host", "127.0.0.1"]
    rest += [] if "--identity" in given else ["--identity", str(tmp_path / "identity")]
    return "petal-serve", petal_serve(*arguments[1:], *rest)


@pytest.mark.parametrize(("line", "code", "says"), [*SERVE, *GENERATE], ids=lambda value: str(value)[:60])
def test_one_line_that_says_what_to_do(line: str, code: int, says: str, words: dict[str, str], tmp_path: Path) -> None:
    program, result = ran(line, words, tmp_path)
    sentence = result.line(program, code)
    assert says in sentence
    assert len(sentence) < 700
    assert "this should not have happened" not in sentence
    assert code != 2 or HELP in sentence


def test_there_are_many() -> None:
    lines = [line for line, _, _ in (*SERVE, *GENERATE)]
    assert len(lines) == len(set(lines)) >= 150


def test_json_is_printed_even_where_no_swarm_answers(words: dict[str, str], tmp_path: Path) -> None:
    _, result = ran("generate MODEL Hi --initial-peers 127.0.0.1:1 --json", words, tmp_path)
    assert result.code == 1
    assert '"error": "No peer answered' in result.out
