"""The gate of a gRPC server: every call is checked before its handler sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from .trust import AuthContext, Trust, TrustError, admit_tls

Handler = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


class Gate(grpc.aio.ServerInterceptor):
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
        if handler.request_streaming:
            make, behaviour = grpc.stream_stream_rpc_method_handler, handler.stream_stream
        else:
            make, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        check = admit_tls if handler_call_details.method in self._open else self._trust.admit
        return make(_guarded(behaviour, check), handler.request_deserializer, handler.response_serializer)


def _guarded(behaviour: Handler, check: Callable[[AuthContext], None]) -> Handler:
    async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
        try:
            check(context.auth_context())
        except TrustError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        return await behaviour(request, context)

    return guarded
