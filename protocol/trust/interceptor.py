"""Between a gRPC server and its handlers: every call is checked before its handler sees it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from .. import petal_pb2 as pb
from .trust import AuthContext, Trust, TrustError, admit_tls

# Whoever is refused gets the signed lists, in case they name it: nobody talks to it any more, but it shall know why.
_LISTS = "petal-revocations-bin"
_MAX_LISTS_BYTES = 8192  # of the 16 KiB that headers may have

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
            behaviour = self._guarded(handler.stream_stream, check)
            return grpc.stream_stream_rpc_method_handler(
                behaviour, handler.request_deserializer, handler.response_serializer
            )
        behaviour = self._guarded(_parsing(handler.unary_unary, handler.request_deserializer), check)
        return grpc.unary_unary_rpc_method_handler(behaviour, None, handler.response_serializer)

    def _guarded(self, behaviour: Handler, check: Callable[[AuthContext], None]) -> Handler:
        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            try:
                check(context.auth_context())
            except TrustError as error:
                await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error), _lists(self._trust))
            return await behaviour(request, context)

        return guarded


def revocations_with(refusal: grpc.aio.AioRpcError) -> Sequence[pb.RevocationList]:
    """The lists that came with a refusal, not believed yet."""
    found = [value for key, value in refusal.trailing_metadata() or () if key == _LISTS and isinstance(value, bytes)]
    try:
        return pb.ListReply.FromString(found[0]).revocations if found else ()
    except DecodeError:
        return ()


def _lists(trust: Trust) -> tuple[tuple[str, bytes], ...]:
    lists = pb.ListReply(revocations=trust.revocations).SerializeToString()
    return ((_LISTS, lists),) if 0 < len(lists) <= _MAX_LISTS_BYTES else ()


def _parsing(behaviour: Handler, parse: Callable[[bytes], Any]) -> Handler:
    """gRPC would call bytes that are no message an unknown error, and log a stack trace for each."""

    async def parsing(data: bytes, context: grpc.aio.ServicerContext) -> Any:
        try:
            request = parse(data)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "what arrived is not a message of this protocol")
        return await behaviour(request, context)

    return parsing
