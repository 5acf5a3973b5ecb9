"""Functions and their calls in OpenAI's words, which chat templates know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

MOST_TOOLS = 256


def function(name: str, description: str | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """A tool that may be called."""
    said: dict[str, Any] = {"name": name, "description": description or ""}
    return {"type": "function", "function": {**said, "parameters": parameters or {"type": "object", "properties": {}}}}


def call(id: str, name: str, arguments: str | Mapping[str, Any]) -> dict[str, Any]:
    """A call that was made. Templates write arguments as they need them, hence get an object, not its text."""
    given: Any = arguments
    if isinstance(arguments, str):
        try:
            given = from_json(arguments or "{}", allow_inf_nan=False)
        except ValueError:
            given = arguments  # what a model wrote is no JSON: templates get it as it was
    return {"id": id, "type": "function", "function": {"name": name, "arguments": given}}


def arguments_of(text: str) -> dict[str, Any]:
    """A call's arguments as an object, also where the model has not written one."""
    try:
        found = from_json(text or "{}", allow_inf_nan=False)
    except ValueError:
        return {"arguments": text} if text else {}
    return found if isinstance(found, dict) else {"arguments": found}
