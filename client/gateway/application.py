"""The application: routes, who may call them, and every error in the words of the API that was called."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from .anthropic import api as anthropic
from .anthropic.messages_reply import PING
from .anthropic.messages_request import CountRequest
from .api import Api, Endpoint
from .body import parse_body, read_body
from .catalog import Catalog
from .door import Door
from .errors import ApiError, api_error
from .keys import KeyRing
from .ollama import api as ollama
from .openai import api as openai
from .openai.models import codex_model, model_object
from .prompt import read_prompt
from .reply import LINES, ClientGone, line
from .responses.api import read_response
from .responses.store import ResponseStore

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
        "/v1/responses": Api(partial(read_response, ResponseStore()), openai.error_object),
        "/v1/messages": Api(anthropic.read_messages, anthropic.error_object, ping=PING),
        "/api/chat": Api(ollama.read_chat, ollama.error_object, line, LINES, ping=b""),
        "/api/generate": Api(ollama.read_generate, ollama.error_object, line, LINES, ping=b""),
    }
    return [Route(path, Endpoint(api, catalog, door).respond, methods=["POST"]) for path, api in apis.items()]


def _lists(catalog: Catalog) -> list[Route]:
    listed = list(catalog)

    async def models(request: Request) -> Response:
        if anthropic.VERSION_HEADER in request.headers:
            return JSONResponse(anthropic.model_list(listed))
        said = {"object": "list", "data": [model_object(m) for m in listed], "models": [codex_model(m) for m in listed]}
        return JSONResponse(said)

    async def model(request: Request) -> Response:
        found = catalog.find(request.path_params["name"])
        shape = anthropic.model_object if anthropic.VERSION_HEADER in request.headers else model_object
        return JSONResponse(shape(found))

    async def count(request: Request) -> Response:
        asked = parse_body(await read_body(request), CountRequest)
        served = catalog.find(asked.model)
        return JSONResponse({"input_tokens": len(read_prompt(served.generator, asked.conversation()).ids)})

    async def show(request: Request) -> Response:
        asked = parse_body(await read_body(request), ollama.ShowRequest)
        return JSONResponse(ollama.shown(catalog.find(asked.model or asked.name or "")))

    async def tags(request: Request) -> Response:
        return JSONResponse(ollama.model_list(listed))

    async def version(request: Request) -> Response:
        return JSONResponse({"version": ollama.VERSION})

    return [
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/messages/count_tokens", count, methods=["POST"]),
        Route("/api/show", show, methods=["POST"]),
        Route("/api/tags", tags),
        Route("/api/ps", tags),
        Route("/api/version", version),
    ]


def _health(catalog: Catalog) -> Callable[[Request], Any]:
    async def health(request: Request) -> Response:
        lacks = {model.name: model.lack for model in catalog if model.lack}
        return JSONResponse({"status": "waiting" if lacks else "ok", "lacks": lacks})

    return health


def _error_response(connection: HTTPConnection, error: ApiError) -> Response:
    path, shape = connection.url.path, openai.error_object
    if path.startswith("/api/"):
        shape = ollama.error_object
    elif path.startswith("/v1/messages") or anthropic.VERSION_HEADER in connection.headers:
        shape = anthropic.error_object
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
