"""The application: routes, who may call them, and every error in the words of the API that was called."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ...protocol.errors import PetalError
from .access import Guard, Refusal
from .api import Api, Endpoint
from .catalog import Catalog
from .door import Door
from .errors import ApiError, api_error
from .keys import KeyRing
from .openai import api as openai
from .openai.models import codex_model, model_object
from .reply import ClientGone

log = logging.getLogger(__name__)

# What a server says to a client that has hung up; nobody hears it.
_CLIENT_GONE = 499


@dataclass(frozen=True)
class GatewayLimits:
    """Requests that run and that wait at a time; seconds that one may wait."""

    running: int = 64
    waiting: int = 256
    patience_s: float = 60.0


def application(catalog: Catalog, keys: KeyRing, limits: GatewayLimits, origins: Sequence[str] = ()) -> Starlette:
    """Serves the catalog's models; whoever calls this starts and closes them."""
    door = Door(limits.running, limits.waiting, limits.patience_s)

    middleware = [
        Middleware(AuthenticationMiddleware, backend=Guard(keys, frozenset(origins)), on_error=_refused),
    ]
    if origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=list(origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
        middleware.insert(0, cors)
    return Starlette(
        routes=[*_generation(catalog, door), *_lists(catalog), Route("/health", _health(catalog))],
        middleware=middleware,
        exception_handlers={
            PetalError: _failed,
            HTTPException: _no_such_route,
            ClientGone: _gone,
            Exception: _broken,
        },
    )


def _generation(catalog: Catalog, door: Door) -> list[Route]:
    apis = {
        "/v1/chat/completions": Api(openai.read_chat, openai.error_object),
        "/v1/completions": Api(openai.read_completion, openai.error_object),
    }
    return [Route(path, Endpoint(api, catalog, door).respond, methods=["POST"]) for path, api in apis.items()]


def _lists(catalog: Catalog) -> list[Route]:
    async def models(request: Request) -> Response:
        listed = list(catalog)
        said = {"object": "list", "data": [model_object(m) for m in listed], "models": [codex_model(m) for m in listed]}
        return JSONResponse(said)

    async def model(request: Request) -> Response:
        return JSONResponse(model_object(catalog.find(request.path_params["name"])))

    return [Route("/v1/models", models), Route("/v1/models/{name:path}", model)]


def _health(catalog: Catalog) -> Callable[[Request], Any]:
    async def health(request: Request) -> Response:
        lacks = {model.name: model.lack for model in catalog if model.lack}
        return JSONResponse({"status": "waiting" if lacks else "ok", "lacks": lacks})

    return health


def _error_response(connection: HTTPConnection, error: ApiError) -> Response:
    shape: Callable[[ApiError], Mapping[str, Any]] = openai.error_object
    return JSONResponse(shape(error), error.status, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, PetalError)
    return _error_response(request, api_error(error))


async def _no_such_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path[:80]
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        said = ApiError(error.status_code, f"{request.method} is not what {path} takes")
    else:
        said = ApiError(error.status_code, f"there is no {path} here", code="unknown_url")
    return _error_response(request, said)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)


async def _broken(request: Request, error: Exception) -> Response:
    log.error("a request failed: %s", error, exc_info=error)
    return _error_response(request, ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "the gateway failed; its log says how"))


def _refused(connection: HTTPConnection, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _error_response(connection, error.error)
