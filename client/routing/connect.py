"""The way into a swarm: whom to believe, and whom to ask."""

from __future__ import annotations

from collections.abc import Sequence

from ...protocol.directory.directory import Directory, DirectoryError, GrpcDirectory
from ...protocol.trust.trust import PublicTrust, Trust
from .peers import ConnectError


async def connect(initial_peers: Sequence[str], join: str | None) -> tuple[Trust, Directory]:
    """The way into a swarm: public through `initial_peers`, private by an invitation. Raises ConnectError."""
    if join is None:
        trust = PublicTrust()
        return trust, await open_directory(initial_peers, trust)
    if initial_peers:
        raise ConnectError("an invitation knows the swarm's addresses; leave initial_peers out")
    # What only private swarms need is imported late.
    from ...protocol.private.invites import InviteError
    from ...protocol.private.joining import join as become_member

    try:
        membership = await become_member(join)
    except InviteError as error:
        raise ConnectError(str(error)) from error
    return membership, GrpcDirectory([*membership.addresses, membership.admin], trust=membership)


async def open_directory(initial_peers: Sequence[str], trust: Trust) -> Directory:
    """The DHT where libp2p multiaddrs are given, any peer's gRPC directory otherwise. Raises ConnectError."""
    if not initial_peers:
        raise ConnectError("name at least one peer of the swarm: a gRPC host:port or a libp2p multiaddr")
    multiaddrs = [peer for peer in initial_peers if peer.startswith("/")]
    if not multiaddrs:
        return GrpcDirectory(initial_peers, trust=trust)
    try:
        # hivemind comes with the extra `peer`; a light client does without.
        from ...protocol.directory.dht import DhtDirectory

        return await DhtDirectory.create(initial_peers=multiaddrs, client_mode=True)
    except ImportError as error:
        raise ConnectError(
            "libp2p addresses need hivemind: pip install 'petal-swarm[peer]', or give a gRPC host:port"
        ) from error
    except DirectoryError as error:
        raise ConnectError(str(error)) from error
