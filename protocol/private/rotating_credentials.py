"""What a server of a private swarm shows: a key and its chain, which may be new at any time."""

from __future__ import annotations

from collections.abc import Callable

import grpc

# Key and chain, both PEM.
KeyAndChain = tuple[bytes, bytes]


def credentials_of(current: Callable[[], KeyAndChain], root: bytes | None = None) -> grpc.ServerCredentials:
    """Shows what `current` says, to callers with a certificate of `root` (PEM) only where there is one.

    gRPC is told only of what is new: with all that it is told it frees what handshakes of other threads may still use.
    Told at every handshake, it crashed within a thousand of them.
    """

    def configuration(key_and_chain: KeyAndChain) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([key_and_chain], root)

    last = current()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal last
        if (newest := current()) == last:
            return None
        last = newest
        return configuration(newest)

    # Its types know nothing of None, which its documentation asks for where nothing is new.
    return grpc.dynamic_ssl_server_credentials(
        configuration(last),
        fetch,  # type: ignore[arg-type]
        require_client_authentication=root is not None,
    )
