"""Between a gRPC server and all else: who calls too often is refused before anything is done for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from ..limits.rates import CallLimiter, CallRates, Verdict
from .connections import Connections


class FloodGuard(grpc.aio.ServerInterceptor):
    """Refuses calls, and hangs up on who goes on. Streams that run are not touched by what others do."""

    def __init__(self, rates: CallRates, connections: Connections) -> None:
        self._limiter = CallLimiter(rates)
        self._connections = connections
        self._refusal = f"calls over this connection come faster than {rates.connection.per_s:g} a second; retry in 1 s"

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = grpc.stream_stream_rpc_method_handler
        behaviour = handler.stream_stream
        if not handler.request_streaming:
            kind, behaviour = grpc.unary_unary_rpc_method_handler, handler.unary_unary
        return kind(self._guarded(behaviour), handler.request_deserializer, handler.response_serializer)

    def _guarded(self, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            verdict = self._limiter.call(context.peer())
            if verdict is Verdict.HANG_UP:
                self._connections.hang_up(context.peer())
            if verdict is not Verdict.ADMITTED:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, self._refusal)
            return await behaviour(request, context)

        return guarded
