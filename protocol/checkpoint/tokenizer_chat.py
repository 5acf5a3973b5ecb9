"""Chat templates: untrusted Jinja text, run in a sandbox with the names that published templates expect."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import PetalError


class ChatTemplateError(PetalError, ValueError):
    """A chat cannot be rendered: the model has no template, or its template refuses these messages."""


def render_chat(template: str | None, messages: Iterable[Mapping[str, Any]], values: Mapping[str, Any]) -> str:
    """Render `messages` (each with "role" and "content") by `template`; raises ChatTemplateError."""
    if template is None:
        raise ChatTemplateError("This model has no chat template: send plain text instead of messages.")
    try:
        # Templates see plain copies, so that none of our objects is in their reach.
        plain = json.loads(json.dumps({**values, "messages": list(messages)}))
        return _compile(template).render(plain)
    # The template is a stranger's program: whatever it raises is its refusal.
    except Exception as error:
        raise ChatTemplateError(f"The model's chat template refuses these messages: {error}.") from error


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt it is plain text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        return nodes.Scope(list(parser.parse_statements(("name:endgeneration",), drop_needle=True)), lineno=line)


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _now
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(format: str) -> str:
    return datetime.now().strftime(format)
