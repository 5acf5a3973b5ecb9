"""OpenAI's Responses API: how bodies are read."""

from __future__ import annotations

from ..api import Asked
from ..blocks import Blocks
from ..body import parse_body
from .reply import ResponsesReply
from .request import ResponsesRequest
from .store import ResponseStore, answered


def read_response(store: ResponseStore, body: bytes, owner: str) -> Asked:
    """Raises ApiError."""
    asked = parse_body(body, ResponsesRequest)
    if asked.asks_nothing:
        return Asked(asked.model, None, ResponsesReply(asked), bool(asked.stream))
    before = store.find(owner, asked.previous_response_id)
    request = asked.generation_request(before)
    messages = [*before, *asked.messages()]

    def complete(id: str, blocks: Blocks) -> None:
        if asked.store is not False:
            store.keep(owner, id, [*messages, answered(blocks)])

    return Asked(asked.model, request, ResponsesReply(asked, complete), bool(asked.stream))
