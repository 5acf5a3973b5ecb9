"""`petal chat`: a conversation in the terminal, with line editing, history and a few commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape

from ...protocol.paths import data_dir
from ...protocol.program import sentence
from ...protocol.trust.private_file import write_private
from ..routing.route import context_of
from ..swarm import SwarmModel
from .report import speed_line
from .terminal import EXPECTED, console, cut_note, show

HELP = """\
/regen          answer the last message again
/system TEXT    begin anew with these instructions; without a text, with none
/clear          begin anew
/save FILE      keep the conversation in a file
/load FILE      go on with one
/help           this
/exit, Ctrl-D   end; Ctrl-C stops an answer"""
_ROLES = ("system", "user", "assistant")
# Of the context, what is left to an answer at least.
_ANSWER_SHARE = 4


class Conversation:
    """Messages in, answers out. What goes wrong costs a turn, never the conversation."""

    def __init__(self, swarm: SwarmModel, settings: dict[str, Any], system: str | None, verbose: bool) -> None:
        self._swarm, self._settings, self._verbose = swarm, settings, verbose
        self._talk = swarm.chat(system=system)
        self._context = context_of(swarm.route())

    def run(self, read: Callable[[], str]) -> None:
        """Until `read` raises EOFError, or somebody says /exit."""
        console.print(f"[dim]Talking with {escape(self._swarm.name)}. /help lists commands, Ctrl-D ends.[/dim]")
        try:
            while self._turn(read):
                pass
        finally:
            self._talk.close()

    def _turn(self, read: Callable[[], str]) -> bool:
        try:
            text = read().strip()
            if text == "/exit":
                return False
            if text.startswith("/"):
                self._command(*text.partition(" ")[::2])
            elif text:
                self._answer(text)
        except EOFError:
            return False
        except KeyboardInterrupt:
            _say("stopped; /exit or Ctrl-D ends the conversation")
        except (*EXPECTED, OSError) as error:
            console.print(f"[red]{escape(sentence(error))}[/red]", highlight=False, soft_wrap=True)
        return True

    def _command(self, name: str, argument: str) -> None:
        argument = argument.strip()
        if name == "/help":
            console.print(HELP, highlight=False, markup=False)
        elif name == "/regen":
            if not any(message["role"] == "user" for message in self._talk.messages):
                raise ValueError("there is no answer yet to give again; say something first")
            self._settings = {**self._settings, "seed": self._settings["seed"] + 1}
            self._answer(None)
        elif name == "/clear":
            self._begin(next((m["content"] for m in self._talk.messages if m["role"] == "system"), None))
        elif name == "/system":
            self._begin(argument or None)
        elif name == "/save":
            self._save(_file(argument))
        elif name == "/load":
            self._load(_file(argument))
        else:
            raise ValueError(f"there is no command {name}; /help lists those that there are")

    def _begin(self, system: str | None) -> None:
        self._talk.messages[:] = [{"role": "system", "content": system}] if system else []
        _say("a new conversation" + (", with your instructions" if system else ""))

    def _save(self, file: Path) -> None:
        write_private(file, json.dumps(self._talk.messages, indent=1, ensure_ascii=False).encode())
        _say(f"{len(self._talk.messages)} messages are in {file}")

    def _load(self, file: Path) -> None:
        try:
            found = json.loads(file.read_text("utf-8"))
            messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in found]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{file} holds no conversation; /save writes them") from None
        if any(message["role"] not in _ROLES for message in messages):
            raise ValueError(f"{file} has messages of others than {', '.join(_ROLES)}; /save writes them")
        self._talk.messages[:] = messages
        _say(f"going on with {len(messages)} messages")

    def _answer(self, question: str | None) -> None:
        self._make_room(question)
        if question is None:
            chunks = self._talk.regenerate(trace=self._verbose, **self._settings)
        else:
            chunks = self._talk.send(question, trace=self._verbose, **self._settings)
        shown = show(chunks, self._verbose)
        if note := cut_note(shown):
            _say(note)
        if self._verbose and shown:
            console.print(speed_line(shown), highlight=False)

    def _make_room(self, question: str | None) -> None:
        """Drop the oldest turns until question and answer fit the context, and say so."""
        tokenizer, messages = self._swarm.tokenizer, self._talk.messages
        assert tokenizer, "a chat has one"
        reserve = min(self._settings["max_new_tokens"], self._context // _ANSWER_SHARE)
        dropped = 0
        while True:
            asked = [*messages, {"role": "user", "content": question}] if question is not None else list(messages)
            turns = [at for at, message in enumerate(asked) if message["role"] == "user"]
            if len(turns) < 2 or len(tokenizer.apply_chat_template(asked)) + reserve <= self._context:
                break
            del messages[turns[0] : turns[1]]
            dropped += 1
        if dropped:
            _say(f"the context of {self._context} tokens is full: the oldest {dropped} turns were dropped")


def reader() -> Callable[[], str]:
    """How messages come in: edited at a terminal, where a paste is one message; line by line from a pipe."""
    if not sys.stdin.isatty():
        return lambda: input()
    # Imported late: it takes as long as all the rest.
    from prompt_toolkit import PromptSession
    from prompt_toolkit.formatted_text import HTML
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        folder = data_dir()
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "chat-history"
        file.touch(mode=0o600)
        session = PromptSession[str](history=FileHistory(str(file)))
    except OSError:
        session = PromptSession[str](history=InMemoryHistory())
    return lambda: session.prompt(HTML("<ansicyan><b>you&gt;</b></ansicyan> "))


def _file(argument: str) -> Path:
    if not argument:
        raise ValueError("name a file, as in /save talk.json")
    return Path(argument).expanduser()


def _say(text: str) -> None:
    console.print(f"[dim]({escape(text)})[/dim]", highlight=False)
