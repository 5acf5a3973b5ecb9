"""A gateway as a program: where it listens, and that it is nobody's by accident."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn

from ...protocol.errors import PetalError
from ...protocol.host import is_loopback, listening_obstacle, numeric, with_port
from ..swarm import AsyncSwarmModel
from .application import GatewayLimits, application
from .catalog import Catalog
from .http_protocol import ImpatientProtocol
from .keys import KeyRing
from .served_model import ServedModel

# What streams may take to end when the gateway does.
GRACE_S = 5
# Connections that wait to be taken up.
BACKLOG = 2048


class GatewayError(PetalError, ValueError):
    """Why a gateway cannot start, in one sentence."""


@dataclass(frozen=True)
class TlsFiles:
    """PEM files that make the gateway speak HTTPS."""

    certificate: Path
    key: Path


def served_model(model: str, initial_peers: Sequence[str] = (), drafter: str = "ngram", **connect: Any) -> ServedModel:
    """A model by the name that its peers or its files have; `connect` is for AsyncSwarmModel.connect."""
    return ServedModel(model, partial(AsyncSwarmModel.connect, model, initial_peers, **connect), drafter)


def check_place(host: str, port: int, keys: KeyRing) -> str:
    """The address to listen at. Raises GatewayError where others would reach a gateway that asks for no keys."""
    try:
        address = numeric(host)
    except ValueError as error:
        raise GatewayError(str(error)) from None
    if not is_loopback(address) and not keys.asks:
        raise GatewayError(
            f"{host} can be reached by others, and this gateway asks for no keys: make one with "
            "`petal keys add LABEL` and start with --keys, or stay at 127.0.0.1"
        )
    if port and (obstacle := listening_obstacle(address, port)):
        raise GatewayError(f"no gateway can listen at {with_port(host, port)}: {obstacle}")
    return address


class _Server(uvicorn.Server):
    """Leaves signals to the program around it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class GatewayServer:
    """Models behind one address."""

    def __init__(
        self,
        models: Sequence[ServedModel],
        keys: KeyRing | None = None,
        limits: GatewayLimits | None = None,
        origins: Sequence[str] = (),
        tls: TlsFiles | None = None,
    ) -> None:
        self.catalog = Catalog(models)
        self._keys = keys = keys or KeyRing()
        self._tls = tls
        config = uvicorn.Config(
            application(self.catalog, keys, limits or GatewayLimits(), origins),
            http=ImpatientProtocol,
            ws="none",
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=GRACE_S,
            ssl_certfile=tls.certificate if tls else None,
            ssl_keyfile=tls.key if tls else None,
        )
        self._server = _Server(config)
        self._url: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self, host: str, port: int) -> None:
        """Serve until stopped. Raises GatewayError, ConnectError."""
        try:
            address = check_place(host, port, self._keys)
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with socket.create_server((address, port), family=family, backlog=BACKLOG) as listening:
                for model in self.catalog:
                    await model.start()
                place = with_port(address, listening.getsockname()[1])
                self._url.set_result(f"{'https' if self._tls else 'http'}://{place}")
                await self._server.serve([listening])
        except BaseException as error:
            if not self._url.done():
                self._url.set_exception(error)
            raise
        finally:
            for model in self.catalog:
                await model.close()

    async def started(self) -> str:
        """The URL, as soon as it can be called. Raises what `run` raises."""
        return await asyncio.shield(self._url)

    def stop(self) -> None:
        self._server.should_exit = True
