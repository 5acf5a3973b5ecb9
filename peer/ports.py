"""Where a peer listens: at the ports that were asked for, at those of its last run, or at any."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from ..protocol.host import listening_obstacle, with_port
from .identity import Claim
from .joining import ServeError
from .options import ServeOptions


class Ports:
    """Ports are remembered by identity, so that lines which others saved stay true; `note` tells where that fails."""

    def __init__(self, options: ServeOptions, claim: Claim, note: Callable[[str], None]) -> None:
        self._options, self._claim, self._note = options, claim, note

    def bind(self, server: grpc.aio.Server, credentials: grpc.ServerCredentials) -> int:
        """The gRPC port. Raises ServeError."""
        host, port = self._options.host, self._options.port or self._last("grpc")
        try:
            bound = server.add_secure_port(with_port(host, port), credentials)
        except RuntimeError as error:
            reason = listening_obstacle(host, port) or "the port is in use or not yours"
            raise ServeError(f"cannot listen on {with_port(host, port)}: {reason}; choose another --port") from error
        self._claim.remember_port("grpc", bound)
        return bound

    def dht(self) -> str:
        """The multiaddr for the DHT's daemon; port 0 is any."""
        family = "ip6" if ":" in self._options.host else "ip4"
        return f"/{family}/{self._options.host}/tcp/{self._options.dht_port or self._last('dht')}"

    def remember_dht(self, port: int) -> None:
        self._claim.remember_port("dht", port)

    def _last(self, kind: str) -> int:
        port = self._claim.port(kind)
        if port and (obstacle := listening_obstacle(self._options.host, port)):
            self._note(f"{kind} port {port}, the last one, cannot be had ({obstacle}): it is another now")
            return 0
        return port
