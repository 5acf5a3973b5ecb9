"""Formats that an answer must have, as APIs ask for them, and what they mean to `generate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import GenerationSettings
from .errors import bad_request


def schema_settings(kind: str, schema: Mapping[str, Any] | bool | None, where: str) -> GenerationSettings:
    """Of text, json_object or json_schema. Raises ApiError."""
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind != "json_schema":
        raise bad_request(f"{where} is text, json_object or json_schema, not {kind[:40]!r}", where)
    if schema is None:
        raise bad_request(f"{where} of type json_schema needs a schema", where)
    return {"json_schema": schema}
