"""What people type and pipe: prompts, conversations, closed pipes."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from petal.client.cli import conversation, demo
from petal.client.cli.conversation import Conversation
from petal.client.cli.prompts import protect_prompt, read_prompt
from petal.client.cli.report import plain_report
from petal.client.cli.word_wrap import WordWrap
from petal.client.output import OutputChunk
from petal.client.routing.route import NoRoute

from ..support.commands import petal, petal_serve


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["generate", "demo", "Hi"], ["generate", "demo", "Hi"]),
        (["generate", "demo", "-5 + 3 = ?"], ["generate", "demo", "--", "-5 + 3 = ?"]),
        (["generate", "demo", "-5 + 3", "--raw"], ["generate", "demo", "--raw", "--", "-5 + 3"]),
        (["generate", "demo", "--raw", "- one"], ["generate", "demo", "--raw", "--", "- one"]),
        (["generate", "demo", "-7"], ["generate", "demo", "--", "-7"]),
        (["generate", "demo", "--", "-5 + 3"], ["generate", "demo", "--", "-5 + 3"]),
        (["generate", "demo", "Hi", "--seed", "-7"], ["generate", "demo", "Hi", "--seed", "-7"]),
        (["generate", "demo", "-"], ["generate", "demo", "-"]),
        (["chat", "demo", "--system", "-be brief -x"], ["chat", "demo", "--system", "-be brief -x"]),
        ([], []),
    ],
)
def test_a_prompt_that_begins_with_a_dash_is_a_prompt(line: list[str], expected: list[str]) -> None:
    assert protect_prompt(line) == expected


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes, tty: bool = False) -> None:
    stream = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: tty)
    monkeypatch.setattr(sys, "stdin", stream)


def test_the_prompt_comes_from_an_argument_a_pipe_or_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, "Wie heißt\ndu?\n".encode())
    assert read_prompt(None) == "Wie heißt\ndu?"
    piped(monkeypatch, b"piped\n", tty=True)
    assert read_prompt("-") == "piped"
    assert read_prompt("said") == "said"
    assert read_prompt("Gr\udcc3\udcbc\udcc3\udc9fe") == "Grüße", "bytes that the locale could not read"
    with pytest.raises(typer.BadParameter, match="there is no prompt; give one in quotes, or pipe it in"):
        read_prompt(None)


@pytest.mark.parametrize(("data", "words"), [(b"\xff\xfe caf\xe9", "not UTF-8"), (b" \n\n", "empty"), (b"", "empty")])
def test_what_is_no_prompt_is_refused(monkeypatch: pytest.MonkeyPatch, data: bytes, words: str) -> None:
    piped(monkeypatch, data)
    with pytest.raises(typer.BadParameter, match=words):
        read_prompt(None)


class Talk:
    """A chat that answers at once; a question may be told to fail."""

    def __init__(self) -> None:
        self.messages: list[dict[str, str]] = []
        self.fails: dict[str, BaseException] = {}
        self.seeds: list[int] = []

    def send(self, text: str, **settings: Any) -> Iterator[OutputChunk]:
        self.messages.append({"role": "user", "content": text})
        return self._answer(settings)

    def regenerate(self, **settings: Any) -> Iterator[OutputChunk]:
        self.messages.pop()
        return self._answer(settings)

    def _answer(self, settings: dict[str, Any]) -> Iterator[OutputChunk]:
        self.seeds.append(settings["seed"])
        if error := self.fails.get(self.messages[-1]["content"]):
            self.messages.pop()
            raise error
        yield OutputChunk([1, 2], "an answer", finish_reason="length")
        self.messages.append({"role": "assistant", "content": "an answer"})

    def close(self) -> None:
        self.messages.append({"role": "closed", "content": ""})


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Talk:
    monkeypatch.setattr(conversation, "context_of", lambda route: 100)
    return Talk()


def converse(talk: Talk, *lines: str | BaseException) -> None:
    tokenizer = SimpleNamespace(
        apply_chat_template=lambda said: [0] * sum(10 * len(m["content"].split()) for m in said)
    )
    swarm = SimpleNamespace(name="tiny", chat=lambda system: talk, route=lambda: None, tokenizer=tokenizer)
    said = iter([*lines, EOFError()])

    def read() -> str:
        line = next(said)
        if isinstance(line, BaseException):
            raise line
        return line

    Conversation(swarm, {"seed": 0, "max_new_tokens": 8}, None, verbose=False).run(read)  # type: ignore[arg-type]


def roles(talk: Talk) -> str:
    return "".join(message["role"][0] for message in talk.messages)


def test_a_fault_costs_a_turn_and_not_the_conversation(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    talk.fails = {"bad": NoRoute("nobody hosts block 3"), "long": ValueError("no room"), "slow": KeyboardInterrupt()}
    converse(talk, "Hi", "bad", "long", "slow", KeyboardInterrupt(), "", "and on")
    assert roles(talk) == "uauac"
    printed = capsys.readouterr()
    assert "nobody hosts block 3" in printed.err
    assert "no room" in printed.err
    assert printed.err.count("stopped") == 2
    assert printed.err.count("cut after 2 tokens") == 2
    assert "Traceback" not in printed.err


def test_commands(talk: Talk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talk.json"
    converse(talk, "Hi", "/regen", "/regen", f"/save {file}", "/clear", "/regen", f"/load {file}", "More", "/exit", "x")
    assert talk.seeds == [0, 1, 2, 2]
    assert roles(talk) == "uauac"
    assert json.loads(file.read_text())[0] == {"role": "user", "content": "Hi"}
    assert "say something first" in capsys.readouterr().err
    converse(talk, "/system Be brief", "/help", "/nonsense", "/save", "/load /no/such", f"/load {__file__}")
    assert talk.messages[0] == {"role": "system", "content": "Be brief"}
    said = capsys.readouterr().err
    for words in (
        "/regen ",
        "there is no command /nonsense; /help",
        "name a file",
        "check the path",
        "no conversation",
    ):
        assert words in said.replace("\n", " ")


def test_a_full_context_drops_the_oldest_turns_and_says_so(talk: Talk, capsys: pytest.CaptureFixture[str]) -> None:
    converse(talk, "/system Brief", "one", "two", "three", "four")
    assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["three", "four"] or roles(talk)[0] == "s"
    assert "the context of 100 tokens is full: the oldest 1 turns were dropped" in capsys.readouterr().err


def test_the_demo_says_what_happened_in_plain_words() -> None:
    chunks = [OutputChunk([1], "a", seconds=0.5), OutputChunk([2, 3, 4], "b", seconds=0.5)]
    assert plain_report(chunks, 3).startswith(
        "4 tokens in 1.0 s, in 2 trips through the 3 peers.\n2 of them were guessed"
    )


@pytest.mark.parametrize("width", [20, 60, 80])
@pytest.mark.parametrize("size", [1, 3, 50])
def test_words_of_answers_are_not_broken(width: int, size: int) -> None:
    text = "The story of a talented artist:\n\n  * who was, she said, quite determined  to make a difference. " * 3
    wrap = WordWrap(width)
    shown = "".join(wrap.add(text[at : at + size]) for at in range(0, len(text), size)) + wrap.flush()
    assert shown.split() == text.split()
    assert max(map(len, shown.splitlines())) <= width
    assert shown.count("\n\n  * who") == 3 or width == 20


def test_what_is_longer_than_a_line_is_printed_as_it_is() -> None:
    wrap = WordWrap(10)
    assert "".join([wrap.add("a " + "x" * 25), wrap.add(" b"), wrap.flush()]).split() == ["a", "x" * 25, "b"]


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", ["generate", "chat", "distill", "swarm invite", "petal-serve"])
def test_help_cuts_no_names(command: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    shown = petal_serve("--help") if command == "petal-serve" else petal(*command.split(), "--help")
    assert shown.code == 0
    assert "…" not in shown.out
    assert "[b]" not in shown.out
    assert not re.search(r"--[\w-]*-\s*\n", shown.out), "the name of an option is broken"


def test_peers_of_a_demo_join_no_other_swarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETAL_INITIAL_PEERS", "192.0.2.1:1")
    monkeypatch.setenv("PETAL_JOIN", "x")
    monkeypatch.setenv("PETAL_SERVE_PORT", "1")
    monkeypatch.setenv("PETAL_ISA", "avx2")
    kept = demo._own_environment()
    assert {name for name in kept if name.startswith("PETAL_")} == {"PETAL_ISA"}
