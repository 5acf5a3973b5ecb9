"""Anthropic's API: how bodies are read, and how errors and lists look."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime, timezone
from http import HTTPStatus
from typing import Any

from ..api import Asked
from ..body import parse_body
from ..errors import ApiError
from ..served_model import ServedModel
from .messages_reply import MessagesReply
from .messages_request import MessagesRequest

# What clients of this API send, whatever they ask.
VERSION_HEADER = "anthropic-version"
_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}


def read_messages(body: bytes, owner: str) -> Asked:
    """Raises ApiError."""
    asked = parse_body(body, MessagesRequest)
    return Asked(asked.model, asked.generation_request(), MessagesReply(asked.model), bool(asked.stream))


def error_object(error: ApiError) -> dict[str, Any]:
    kind = "api_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    said = {"type": _TYPES.get(error.status, kind), "message": str(error)}
    return {"type": "error", "error": said, "request_id": f"req_{secrets.token_hex(12)}"}


def model_object(model: ServedModel) -> dict[str, Any]:
    created = datetime.fromtimestamp(model.started, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"type": "model", "id": model.name, "display_name": model.name, "created_at": created}


def model_list(models: Sequence[ServedModel]) -> dict[str, Any]:
    listed = [model_object(model) for model in models]
    return {"data": listed, "has_more": False, "first_id": listed[0]["id"], "last_id": listed[-1]["id"]}
