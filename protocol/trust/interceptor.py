"""Between a gRPC server and its handlers: every call is checked before its handler sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from .trust import AuthContext, Trust, TrustError, admit_tls

Handler = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


class TrustInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls of whoever `trust` does not admit; of the `open` methods it asks only for TLS."""

    def __init__(self, trust: Trust, open: frozenset[str] = frozenset()) -> None:
        self._trust = trust
        self._open = open

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # gRPC itself says that there is no such method
            return None
        check = admit_tls if handler_call_details.method in self._open else self._trust.admit
        if handler.request_streaming:
            behaviour = _guarded(handler.stream_stream, check)
            return grpc.stream_stream_rpc_method_handler(
                behaviour, handler.request_deserializer, handler.response_serializer
            )
        behaviour = _guarded(_parsing(handler.unary_unary, handler.request_deserializer), check)
        return grpc.unary_unary_rpc_method_handler(behaviour, None, handler.response_serializer)


def _guarded(behaviour: Handler, check: Callable[[AuthContext], None]) -> Handler:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            check(context.auth_context())
        except TrustError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        return await behaviour(request, context)

    return guarded


def _parsing(behaviour: Handler, parse: Callable[[bytes], Any]) -> Handler:
    """gRPC would call bytes that are no message an unknown error, and log a stack trace for each."""

    async def parsing(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            request = parse(data)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "what arrived is not a message of this protocol")
        return await behaviour(request, context)

    return parsing
