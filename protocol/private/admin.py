"""The service of an admin: redeems invitations, renews memberships, and keeps members in touch with each other."""

from __future__ import annotations

import asyncio

import grpc

from .. import petal_pb2 as pb
from ..directory.directory import DirectoryService
from ..host import listening_obstacle, with_port
from ..petal_pb2_grpc import AdminServicer, add_AdminServicer_to_server, add_DirectoryServicer_to_server
from ..trust.interceptor import TrustInterceptor
from ..trust.tls_key import name_of, pem_of, self_signed
from ..trust.trust import TrustError
from ..wire.limits import SERVER_OPTIONS
from .authority import Authority
from .gossip import GossipDirectory
from .invites import InviteError
from .membership import LOOK_S, Membership
from .rotating_credentials import KeyAndChain, credentials_of

REDEEM = "/petal.v1.Admin/Redeem"
MAX_KNOWN = 16


class AdminServer(AdminServicer):
    """Joiners reach it at the authority's address, without a certificate, and members one port above, with theirs."""

    def __init__(self, authority: Authority, host: str) -> None:
        self.authority = authority
        self._host = host
        self._certificates: dict[bytes, bytes] = {}
        self.membership: Membership = authority.membership
        self.directory = GossipDirectory(self.membership, authority.members_at)

    async def start(self) -> None:
        """Raises RuntimeError where a port is taken."""
        port = int(self.authority.address.rpartition(":")[2])
        self._server = grpc.aio.server(
            interceptors=[TrustInterceptor(self.membership, frozenset({REDEEM}))], options=SERVER_OPTIONS
        )
        add_AdminServicer_to_server(self, self._server)
        name = self.membership.name
        directory = DirectoryService(
            name,
            state=lambda: pb.ONLINE,
            records=self.directory.book.signed,
            heard=self.directory.hear,
            revocations=lambda: self.membership.revocations,
        )
        add_DirectoryServicer_to_server(directory, self._server)
        self._listen(port, credentials_of(self._key_and_chain))
        self._listen(port + 1, self.membership.server_credentials())
        await self._server.start()
        await self.directory.join()
        self._renewing = asyncio.create_task(self._keep())

    def _listen(self, port: int, credentials: grpc.ServerCredentials) -> None:
        where = with_port(self._host, port)
        try:
            self._server.add_secure_port(where, credentials)
        except RuntimeError as error:
            reason = listening_obstacle(self._host, port) or "the port is in use"
            raise RuntimeError(
                f"cannot listen on {where}: {reason}; where this admin runs already, leave it be, else choose another "
                "port with --address"
            ) from error

    async def stop(self) -> None:
        self._renewing.cancel()
        await self.directory.close()
        await self._server.stop(grace=1.0)

    async def Redeem(self, request: pb.RedeemRequest, context: grpc.aio.ServicerContext) -> pb.Issued:
        """A joiner's first certificate."""
        try:
            return self._issued(self.authority.redeem(request.token, request.request))
        except (InviteError, TrustError) as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
            raise

    async def Renew(self, request: pb.CertificateRequest, context: grpc.aio.ServicerContext) -> pb.Issued:
        """A member's next certificate."""
        try:
            member = self.membership.principal(context.auth_context(), pb.Hello(), b"")
            certificates = self.authority.renew(request, member.name, member.role, dict(member.labels))
            return self._issued(certificates)
        except (InviteError, TrustError) as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
            raise

    def _issued(self, certificates: list[bytes]) -> pb.Issued:
        known = [record.addresses[0] for record in self.directory.book.list() if record.addresses]
        return pb.Issued(
            certificates=certificates,
            root=self.membership.root_der,
            addresses=[self.authority.members_at, *known[:MAX_KNOWN]],
            revocations=self.membership.revocations,
            admin=self.authority.members_at,
        )

    @property
    def certificate(self) -> bytes:
        """What joiners are shown (DER)."""
        key = self.authority.key
        if key.public_key not in self._certificates:
            self._certificates = {key.public_key: self_signed(key, name_of(key.public_key))}
        return self._certificates[key.public_key]

    def _key_and_chain(self) -> KeyAndChain:
        """To joiners it proves itself by the admin's very key, which their token names; a rotation makes a new one."""
        key = self.authority.key
        return key.pem, pem_of([self.certificate])

    async def _keep(self) -> None:
        while True:
            if self.membership.due:
                self.authority.join_own_swarm()
            self.membership.reload()
            await asyncio.sleep(LOOK_S)
