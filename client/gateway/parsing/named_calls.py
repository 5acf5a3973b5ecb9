"""Calls whose name stands in front of their arguments: JSON, pairs of keys and values, or Gemma's own notation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from pydantic_core import from_json

from .json_calls import JsonValue
from .part import Part

# Whether a tool's argument is text, by the names of both; what is not is written as JSON.
IsText = Callable[[str, str], bool]


class NamedJson:
    """`before` NAME `after` {…}: DeepSeek, Mistral and gpt-oss."""

    def __init__(self, before: str, after: str) -> None:
        self.ended = False
        self.rest = ""
        self._before, self._after = before, after
        self._head: str | None = ""
        self._value = JsonValue()
        self._begun = False

    @property
    def quoted(self) -> bool:
        return self._value.in_string

    def feed(self, text: str) -> Iterator[Part]:
        if self._head is not None:
            self._head += text
            name, found, text = self._head.partition(self._after)
            if self._before and name.lstrip().startswith(self._before):
                # What stands before the name may contain what stands behind it.
                name, found, text = self._head.lstrip()[len(self._before) :].partition(self._after)
            if not found:
                return
            self._head = None
            yield Part("call", name.strip())
        yield from self._arguments(text)

    def close(self) -> Iterator[Part]:
        if self._head is None and not self._begun:
            yield Part("arguments", "{}")

    def _arguments(self, text: str) -> Iterator[Part]:
        for at, character in enumerate(text):
            if self.ended:
                self.rest += text[at:]
                return
            if not self._begun and character != "{":
                continue
            self._begun = True
            self._value.take(character)
            self.ended = self._value.ended
            yield Part("arguments", character)


class Pairs:
    """A name, then keys and values between marks of their own: GLM and Qwen's coders. Values come out whole."""

    def __init__(self, name: tuple[str, str], key: tuple[str, str], value: tuple[str, str], is_text: IsText) -> None:
        """Of each what opens and what closes it."""
        self.ended = False
        self.rest = ""
        self._marks = {"name": name, "key": key, "value": value}
        self._is_text = is_text
        self._state = "name"
        self._held = ""
        self._name = self._key = ""
        self._count = 0

    @property
    def quoted(self) -> bool:
        return False

    def feed(self, text: str) -> Iterator[Part]:
        self._held += text
        while (found := self._next()) is not None:
            if self._state == "name":
                self._name, self._state = found.strip(), "key"
                yield Part("call", self._name)
            elif self._state == "key":
                self._key, self._state = found.strip(), "value"
            else:
                self._state = "key"
                yield Part("arguments", f"{', ' if self._count else '{'}{json.dumps(self._key)}: {self._json(found)}")
                self._count += 1

    def close(self) -> Iterator[Part]:
        if self._state == "name" and not self._marks["name"][0] and (name := self._held.strip()):
            yield Part("call", name)  # a call without arguments ends behind its name
            self._state = "key"
        if self._state != "name":
            yield Part("arguments", "}" if self._count else "{}")

    def _next(self) -> str | None:
        """What stands between the marks that come next, once both are there."""
        opening, closing = self._marks[self._state]
        start = self._held.find(opening)
        if start < 0:
            return None
        end = self._held.find(closing, start + len(opening))
        if end < 0:
            return None
        found = self._held[start + len(opening) : end]
        self._held = self._held[end + len(closing) :]
        return found

    def _json(self, value: str) -> str:
        # Each stands on lines of its own.
        value = value.removeprefix("\n").removesuffix("\n")
        if not self._is_text(self._name, self._key):
            try:
                return json.dumps(from_json(value, allow_inf_nan=False), ensure_ascii=False)
            except ValueError:
                pass
        return json.dumps(value, ensure_ascii=False)


class GemmaCall:
    """`call:NAME{key:<quote>text<quote>,other:3}`, with a token in place of quotes."""

    def __init__(self, quote: str) -> None:
        self.ended = False
        self.rest = ""
        self._quote = quote
        self._named = self._quoted = False
        self._held = self._word = ""
        self._depth = 0

    @property
    def quoted(self) -> bool:
        return self._quoted

    def feed(self, text: str) -> Iterator[Part]:
        self._held += text
        if not self._named:
            name, brace, rest = self._held.partition("{")
            if not brace:
                return
            self._named, self._held = True, "{" + rest
            yield Part("call", name.strip().removeprefix("call:").strip())
        yield from self._convert(len(self._held) - len(self._quote) + 1)

    def close(self) -> Iterator[Part]:
        if self._named:
            yield from self._convert(len(self._held))

    def _convert(self, until: int) -> Iterator[Part]:
        """Into JSON; the last characters wait, since they may begin a quote."""
        at = 0
        while at < until and not self.ended:
            if self._held.startswith(self._quote, at):
                at += len(self._quote)
                self._quoted = not self._quoted
                yield Part("arguments", '"')
            else:
                yield from self._character(self._held[at])
                at += 1
        self._held = self._held[at:]
        if self.ended:
            self.rest, self._held = self._held, ""

    def _character(self, character: str) -> Iterator[Part]:
        if self._quoted:
            yield Part("arguments", json.dumps(character, ensure_ascii=False)[1:-1])
        elif character not in "{}[],:":
            self._word += character
        else:
            word, self._word = self._word.strip(), ""
            yield Part("arguments", (json.dumps(word) if word and character == ":" else word) + character)
            self._depth += (character in "{[") - (character in "}]")
            self.ended = self._depth == 0
