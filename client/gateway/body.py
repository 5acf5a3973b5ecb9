"""The body of a request: read within limits, then checked field by field."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from .errors import ApiError, bad_request

# Of one request. Prompts of a long context are a fraction of it.
BODY_BYTES = 8 << 20
HEARD_BYTES = 64 << 20
BODY_S = 30.0
_SHOWN = 200


# Clients write 1 as well as 1.0.
Number = Annotated[float, Field(strict=False)]


class Body(BaseModel):
    """A request body whose unknown fields are refused: what is not understood cannot be honoured."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, frozen=True)


class TolerantBody(BaseModel):
    """A request body of a client that sends fields which its API has not told anybody of yet."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True, frozen=True)


B = TypeVar("B", bound=BaseModel)


async def read_body(request: Request) -> bytes:
    """Raises ApiError for one that is too large or takes too long."""
    try:
        return await asyncio.wait_for(_read(request), BODY_S)
    except asyncio.TimeoutError:
        raise ApiError(HTTPStatus.REQUEST_TIMEOUT, f"the body did not arrive within {BODY_S:g} s") from None
    except ClientDisconnect:
        raise ApiError(HTTPStatus.BAD_REQUEST, "the connection ended within the body") from None


async def _read(request: Request) -> bytes:
    """A body that is too large is heard out, as far as that is bearable: else its sender would not hear the answer."""
    body, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size > HEARD_BYTES:
            break
        if size <= BODY_BYTES:
            body += piece
    if size > BODY_BYTES:
        raise ApiError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {BODY_BYTES} bytes")
    return bytes(body)


def parse_body(body: bytes, model: type[B]) -> B:
    """Raises ApiError, with the field at fault and what is allowed there."""
    try:
        said = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise bad_request(f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(said, Mapping):
        raise bad_request("the body is a JSON object", code="invalid_json")
    try:
        return model.model_validate(said)
    except ValidationError as error:
        raise _first_fault(error, model) from None


def _first_fault(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """Of several faults the first; where a field has several types, that of the one which got furthest."""
    faults = error.errors(include_url=False, include_context=False)
    fault: Mapping[str, Any] = max(faults[:50], key=lambda each: len(each["loc"]))
    where = ".".join(str(part) for part in fault["loc"] if _is_place(part))
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), model.model_fields, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return bad_request(f"this gateway knows no field {where[:_SHOWN]!r}{hint}", where, "unknown_parameter")
    message = str(fault["msg"])[:_SHOWN]
    return bad_request(f"{where[:_SHOWN]}: {message[:1].lower()}{message[1:]}", where, "invalid_value")


def _is_place(part: object) -> bool:
    """Fields and indices are; names of a union's members are not."""
    return isinstance(part, int) or (isinstance(part, str) and part.isidentifier() and not part[:1].isupper())
