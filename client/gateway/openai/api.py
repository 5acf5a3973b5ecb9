"""OpenAI's APIs: how bodies are read, and how errors look."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from ..api import Asked
from ..body import parse_body
from ..errors import ApiError
from .chat_reply import ChatReply
from .chat_request import ChatRequest
from .completion_reply import CompletionReply
from .completion_request import CompletionRequest

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "service_unavailable_error",
}


def read_chat(body: bytes, owner: str) -> Asked:
    """Raises ApiError."""
    asked = parse_body(body, ChatRequest)
    request = asked.generation_request()
    reply = ChatReply(request.model, request.n, asked.top_logprobs or 0, request.logprobs, asked.includes_usage)
    return Asked(asked.model, request, reply, bool(asked.stream))


def read_completion(body: bytes, owner: str) -> Asked:
    """Raises ApiError."""
    asked = parse_body(body, CompletionRequest)
    request = asked.generation_request()
    choices = len(request.prompts) * request.n
    echoed = []
    if asked.echo:
        texts = [prompt for prompt in asked.prompts if isinstance(prompt, str)]
        if len(texts) < len(asked.prompts):
            raise ApiError(HTTPStatus.BAD_REQUEST, "echo=true needs prompts that are text", param="echo")
        echoed = [text for text in texts for _ in range(request.n)]
    reply = CompletionReply(request.model, choices, asked.logprobs, echoed, asked.includes_usage)
    return Asked(asked.model, request, reply, bool(asked.stream))


def error_object(error: ApiError) -> dict[str, Any]:
    """As the API's clients expect it."""
    kind = "server_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    said = {
        "message": str(error),
        "type": _TYPES.get(error.status, kind),
        "param": error.param,
        "code": error.code,
    }
    return {"error": said}
