"""What was said up to a response, for those that follow it: in memory only, the oldest forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from http import HTTPStatus

from ..blocks import Blocks
from ..errors import ApiError
from ..functions import call
from ..generation_request import Message

MOST_CHARACTERS = 64 << 20


class ResponseStore:
    """Conversations by response and owner; nobody finds another's."""

    def __init__(self, most_characters: int = MOST_CHARACTERS) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[Sequence[Message], int]] = OrderedDict()
        self._most = most_characters
        self._size = 0

    def keep(self, owner: str, id: str, messages: Sequence[Message]) -> None:
        size = sum(len(str(message)) for message in messages)
        self._kept[owner, id] = (messages, size)
        self._size += size
        while self._size > self._most:
            self._size -= self._kept.popitem(last=False)[1][1]

    def find(self, owner: str, id: str | None) -> Sequence[Message]:
        """Raises ApiError where it is not kept, or not any more."""
        if id is None:
            return ()
        if (owner, id) not in self._kept:
            message = f"there is no response {id[:80]!r} to follow, or none any more"
            raise ApiError(HTTPStatus.NOT_FOUND, message, param="previous_response_id", code="not_found")
        self._kept.move_to_end((owner, id))
        return self._kept[owner, id][0]


def answered(blocks: Blocks) -> Message:
    """The assistant's message that a response was."""
    said = {kind: "".join(b.text for b in blocks.blocks if b.kind == kind) for kind in ("text", "reasoning")}
    calls = [call(block.id, block.name, block.text) for block in blocks.blocks if block.kind == "call"]
    thought = {"reasoning_content": said["reasoning"]} if said["reasoning"] else {}
    return {"role": "assistant", "content": said["text"], **thought, **({"tool_calls": calls} if calls else {})}
