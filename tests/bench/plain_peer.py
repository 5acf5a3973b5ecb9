"""`petal-serve` without TLS, which Petal itself does not offer: the reference of the security bench."""

from __future__ import annotations

import grpc
from petal.peer import cli, server
from petal.protocol import petal_pb2 as pb
from petal.protocol.trust.trust import Options, PublicTrust


class PlainTrust(PublicTrust):
    """A public swarm's trust over bare TCP."""

    def server_credentials(self) -> grpc.ServerCredentials:
        return grpc.insecure_server_credentials()

    def admit(self, context: object) -> None:
        pass

    def channel(self, record: pb.PeerRecord, address: str, options: Options = ()) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address, options=list(options))

    def dial(self, address: str, options: Options) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(address, options=list(options))


if __name__ == "__main__":
    server.PublicTrust = PlainTrust
    cli.main()
