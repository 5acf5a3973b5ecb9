"""Ollama's API: how bodies are read, and how errors and lists look."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from pydantic import Field

from ..api import Asked
from ..body import TolerantBody, parse_body
from ..errors import ApiError
from ..served_model import ServedModel
from .replies import OllamaReply
from .requests import ChatRequest, GenerateRequest

# The release whose API this is: clients refuse to talk to those that are too old for what they need.
VERSION = "0.12.6"


class ShowRequest(TolerantBody):
    """POST /api/show; older clients call the field `name`."""

    model: str | None = Field(None, max_length=512)
    name: str | None = Field(None, max_length=512)


def read_chat(body: bytes, owner: str) -> Asked:
    """Raises ApiError."""
    return _asked(parse_body(body, ChatRequest))


def read_generate(body: bytes, owner: str) -> Asked:
    """Raises ApiError."""
    return _asked(parse_body(body, GenerateRequest))


def _asked(asked: ChatRequest | GenerateRequest) -> Asked:
    reply = OllamaReply(asked.model, chats=isinstance(asked, ChatRequest), loads=asked.asks_nothing)
    request = None if asked.asks_nothing else asked.generation_request()
    return Asked(asked.model, request, reply, asked.stream is not False)


def error_object(error: ApiError) -> dict[str, Any]:
    return {"error": str(error)}


def model_list(models: Sequence[ServedModel]) -> dict[str, Any]:
    """GET /api/tags and /api/ps: what is served is always loaded somewhere."""
    return {"models": [_model(model) for model in models]}


def shown(model: ServedModel) -> dict[str, Any]:
    """POST /api/show."""
    template = (model.tokenizer.chat_template if not model.lack else None) or ""
    info = {"general.architecture": "petal", "petal.context_length": model.context_length}
    return {
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": _details(model),
        "model_info": info,
        "capabilities": ["completion", "tools"] if "tools" in template else ["completion"],
    }


def _model(model: ServedModel) -> dict[str, Any]:
    since = datetime.fromtimestamp(model.started, timezone.utc).isoformat()
    digest = model.route[0].peer.model_digest.hex() if model.route else ""
    named = {"name": model.name, "model": model.name, "modified_at": since, "size": 0, "digest": digest}
    return {**named, "details": _details(model), "expires_at": since, "size_vram": 0}


def _details(model: ServedModel) -> dict[str, Any]:
    kinds = sorted({stop.peer.quantization or stop.peer.dtype for stop in model.route})
    return {
        "parent_model": "",
        "format": "petal",
        "family": "petal",
        "families": ["petal"],
        "parameter_size": "",
        "quantization_level": ", ".join(kinds),
    }
