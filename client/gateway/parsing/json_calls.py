"""Calls written as JSON objects with a name and arguments, alone or in a list."""

from __future__ import annotations

import json
from collections.abc import Iterator

from pydantic_core import from_json

from .part import Part

NAMES = ("name", "function")
ARGUMENTS = ("arguments", "parameters")


class JsonValue:
    """Follows one JSON value through its characters; `ended` behind its last one. What is no JSON ends somewhere."""

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.ended = False
        self._escaped = False
        self._begun = False

    def take(self, character: str) -> None:
        if self.in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self.in_string = False
                self.ended = self.depth == 0
        elif character == '"':
            self.in_string = self._begun = True
        elif character in "{[":
            self.depth += 1
            self._begun = True
        elif character in "}]":
            self.depth -= 1
            self.ended = self.depth <= 0
        elif not character.isspace():
            self._begun = True


class JsonCalls:
    """`{"name": "f", "arguments": {…}}`, or several in a list. Arguments flow as soon as the name is known."""

    def __init__(self) -> None:
        self.ended = False
        self.rest = ""
        self._value = JsonValue()
        # Depth of the members of a call; 0 outside of one.
        self._inside = 0
        self._key: str | None = None
        self._raw = ""
        self._named = self._streams = False
        self._held: str | None = None

    @property
    def quoted(self) -> bool:
        return self._value.in_string

    def feed(self, text: str) -> Iterator[Part]:
        for at, character in enumerate(text):
            if self.ended:
                self.rest += text[at:]
                return
            yield from self._take(character)

    def close(self) -> Iterator[Part]:
        if self._inside and self._named:
            yield from self._complete()

    def _take(self, character: str) -> Iterator[Part]:
        value, structural = self._value, not self._value.in_string
        value.take(character)
        if structural and character == "{" and not self._inside:
            self._begin_call(value.depth)
            return
        if not self._inside:
            self.ended = value.ended
            return
        at_members = structural and value.depth == self._inside
        if structural and character == "}" and value.depth == self._inside - 1:
            yield from self._end_member()
            yield from self._complete()
            self._inside, self.ended = 0, value.ended
        elif at_members and character == ",":
            yield from self._end_member()
        elif at_members and character == ":" and self._key is None:
            self._key, self._raw = _text_of(self._raw), ""
        else:
            yield from self._grow(character)

    def _grow(self, character: str) -> Iterator[Part]:
        """A character of a key or of a value."""
        if self._streams:
            yield Part("arguments", character)
            return
        self._raw += character
        if self._key in ARGUMENTS and self._named and self._held is None and self._raw.lstrip()[:1] == "{":
            self._streams = True
            yield Part("arguments", self._raw.lstrip())

    def _begin_call(self, depth: int) -> None:
        self._inside, self._key, self._raw = depth, None, ""
        self._named = self._streams = False
        self._held = None

    def _end_member(self) -> Iterator[Part]:
        if self._streams:
            self._held = ""  # they are out
        elif self._key in NAMES and not self._named and (name := _text_of(self._raw)):
            self._named = True
            yield Part("call", name)
        elif self._key in ARGUMENTS and self._held is None:
            raw = self._raw.strip()
            self._held = _text_of(raw) if raw.startswith('"') else raw
        self._key, self._raw, self._streams = None, "", False

    def _complete(self) -> Iterator[Part]:
        """Arguments that came before the name, or not at all."""
        if self._named and not self._streams:
            yield Part("arguments", "{}" if self._held is None else self._held)


def _text_of(raw: str) -> str:
    """What a JSON string says; a key without quotes as it is."""
    raw = raw.strip()
    try:
        value = from_json(raw)
    except ValueError:
        return raw.strip('"')
    return value if isinstance(value, str) else json.dumps(value)
