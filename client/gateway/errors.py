"""Why a request is refused or has failed, and how an HTTP status says it."""

from __future__ import annotations

from http import HTTPStatus

import grpc

from ...protocol.checkpoint.tokenizer_chat import ChatTemplateError
from ...protocol.directory.directory import DirectoryError
from ...protocol.errors import PetalError
from ...protocol.wire.sampling import SamplingError
from ..arguments import SettingsError
from ..drafting.drafter import DrafterError
from ..routing.peers import ConnectError
from ..routing.route import NoRoute
from ..session.peer_error import PeerError

# Where nobody can say when there will be room.
RETRY_S = 2.0
# Part of the request was not read, and whoever goes on sending it is not listened to.
_UNREAD = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT)


# What peers say of requests that no other peer would serve either.
_AT_FAULT = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT)


class ApiError(PetalError):
    """One sentence for the caller. `param` is the field at fault, `code` a word for programs."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status = HTTPStatus(status)
        self.param = param
        self.code = code
        self.retry_s = retry_s

    @property
    def headers(self) -> dict[str, str]:
        if self.status in _UNREAD:
            return {"connection": "close"}
        return {"retry-after": str(max(1, round(self.retry_s)))} if self.retry_s else {}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, message, param=param, code=code)


def too_many(message: str, retry_s: float = RETRY_S) -> ApiError:
    return ApiError(HTTPStatus.TOO_MANY_REQUESTS, message, code="rate_limit_exceeded", retry_s=retry_s)


def unavailable(message: str, retry_s: float = RETRY_S) -> ApiError:
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, message, code="model_unavailable", retry_s=retry_s)


def api_error(error: PetalError) -> ApiError:
    """What a client of the swarm raises, in the words of HTTP."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, (SettingsError, SamplingError, ChatTemplateError, DrafterError)):
        return bad_request(str(error))
    if isinstance(error, PeerError):
        return _of_peer(error)
    if isinstance(error, (NoRoute, ConnectError, DirectoryError)):
        return unavailable(str(error))
    return ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, str(error))


def _of_peer(error: PeerError) -> ApiError:
    if error.busy:
        return too_many(f"the swarm has no room now: {error}")
    if error.code in _AT_FAULT:
        return bad_request(str(error))
    return unavailable(str(error))
