"""The prompt of a command line: as an argument, from a pipe, or from `-`; and what must be no prompt."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import typer

_NAMED = ("auto", "ngram", "model", "none", "demo")
# Options have no spaces in them, and begin with a letter; numbers may be an option's value.
_TEXT, _NUMBER = re.compile(r"-.*\s.*", re.DOTALL), re.compile(r"-[^A-Za-z-].*", re.DOTALL)
_TAKES_PROMPT = ("generate", "demo")


def protect_prompt(arguments: Sequence[str]) -> list[str]:
    """The same command line, in which a prompt that begins with a dash is taken for a prompt."""
    found = [
        at
        for at, text in enumerate(arguments)
        if _TEXT.fullmatch(text) or (_NUMBER.fullmatch(text) and not arguments[at - 1].startswith("-"))
    ]
    if not found or arguments[0] not in _TAKES_PROMPT or "--" in arguments:
        return list(arguments)
    rest = [text for at, text in enumerate(arguments) if at != found[-1]]
    return [*rest, "--", arguments[found[-1]]]


def read_prompt(prompt: str | None) -> str:
    """The prompt; `-`, or none where something is piped in, reads it from standard input. Raises BadParameter."""
    piped = prompt == "-" or (prompt is None and not sys.stdin.isatty())
    if prompt is None and not piped:
        raise typer.BadParameter("there is no prompt; give one in quotes, or pipe it in", param_hint="PROMPT")
    data = sys.stdin.buffer.read() if piped else os.fsencode(prompt or "")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise typer.BadParameter(
            "the prompt is not UTF-8; convert it first, as with iconv -t UTF-8", param_hint="PROMPT"
        ) from None
    text = text.removesuffix("\n") if piped else text
    if not text.strip():
        raise typer.BadParameter("the prompt is empty; say something", param_hint="PROMPT")
    return text


def check_drafter(drafter: str) -> str:
    """A drafter that may exist: what is misspelt is refused before anything loads. Raises BadParameter."""
    for part in (part.strip() for part in drafter.split(",")):
        if part not in _NAMED and "/" not in part and not Path(part).exists():
            close = difflib.get_close_matches(part, _NAMED, 1)
            hint = f"did you mean {close[0]}?" if close else f"choose {', '.join(_NAMED[:-1])}, a path or a hub id"
            raise typer.BadParameter(f"there is no drafter {part!r}; {hint}")
    return drafter
