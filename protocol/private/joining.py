"""Joining a private swarm: an invitation is redeemed once; from then on the folder says who one is."""

from __future__ import annotations

import asyncio
import datetime
import time
from pathlib import Path

import grpc
from cryptography import x509

from .. import petal_pb2 as pb
from ..paths import data_dir
from ..petal_pb2_grpc import AdminStub
from ..trust.identity import Identity
from ..trust.tls_key import X509_ERRORS, TlsKey, name_of, parse_certificate, public_bytes
from ..trust.trust import DIAL_S, TrustError, pinned, presented
from ..wire.limits import DIRECTORY_OPTIONS
from .authority import Authority, folder_of
from .certificates import fingerprint, verify_chain
from .invites import Invite, InviteError, read_token
from .membership import Membership, request_for

REDEEM_TIMEOUT_S = 10.0


async def join(text: str, identity: Identity | None = None, folder: Path | None = None) -> Membership:
    """Be a member of the swarm that an invitation (or the file that holds it) is for. Raises InviteError.

    Who is a member already stays one, whatever became of the invitation. Peers join with their identity; clients make
    a key. `folder` holds memberships, one a swarm.
    """
    token, invite = read_token(text)
    place = (folder or data_dir() / "members") / invite.root[:16]
    try:
        membership = Membership(place)
        if membership.valid:
            membership.find_admin(invite)
            return membership
    except (OSError, ValueError, KeyError):
        pass  # not a member yet
    return await redeem(token, invite, identity, place)


async def redeem(token: str, invite: Invite, identity: Identity | None, place: Path) -> Membership:
    """Become a member. Raises InviteError."""
    if invite.expires_at < time.time():
        raise InviteError("this invitation has expired; ask for a new one")
    if invite.role != (role := "peer" if identity else "client"):
        raise _other_role(invite, role)
    key = TlsKey.ephemeral()
    issued = await ask(invite, pb.RedeemRequest(token=token, request=request_for(key, identity)))
    try:
        root = x509.load_der_x509_certificate(issued.root)
        if fingerprint(root) != invite.root:
            raise TrustError("the admin's root is not the one that the invitation names")
        member = verify_chain(root, issued.certificates, datetime.datetime.now(datetime.timezone.utc))
        if member.name != name_of(identity.public_key if identity else key.public_key) or member.role != invite.role:
            raise TrustError("the admin issued a certificate for somebody else")
    except (*X509_ERRORS, TrustError) as error:
        raise InviteError(f"the admin cannot be believed: {error}") from error
    return Membership.store(place, key, issued)


async def join_as_admin(text: str, address: str, folder: Path | None = None) -> Authority:
    """Become an admin of the swarm that an invitation is for, reached at `address`. Raises InviteError, ValueError."""
    token, invite = read_token(text)
    if invite.role != "admin":
        raise _other_role(invite, "admin")
    folder = folder or folder_of(invite.swarm)
    if (folder / "root.pem").exists():
        raise InviteError(f"this machine administers a swarm {invite.swarm} already, in {folder}")
    key = TlsKey.ephemeral()
    issued = await ask(invite, pb.RedeemRequest(token=token, request=request_for(key, None)))
    try:
        root, admin = x509.load_der_x509_certificate(issued.root), parse_certificate(issued.certificates[0])
        admin.verify_directly_issued_by(root)
        if fingerprint(root) != invite.root or public_bytes(admin.public_key()) != key.public_key:  # type: ignore[arg-type]
            raise TrustError("its root or its certificate is not what the invitation says")
    except (*X509_ERRORS, IndexError, TrustError) as error:
        raise InviteError(f"the admin cannot be believed: {error}") from error
    authority = Authority.store(folder, address, key, root, admin)
    authority.membership.remember(issued.addresses)
    return authority


def _other_role(invite: Invite, role: str) -> InviteError:
    return InviteError(
        f"this invitation is for {'an' if invite.role == 'admin' else 'a'} {invite.role}; "
        f"ask for one of `petal swarm invite --role {role}`"
    )


async def ask(invite: Invite, request: pb.RedeemRequest) -> pb.Issued:
    """Redeem at the very admin who has signed the invitation: its TLS key is the one that did. Raises InviteError.

    gRPC trusts roots, not keys: so the certificate is looked at first, and then is the only root.
    """
    failures = []
    for address in invite.addresses:
        try:
            certificate = await asyncio.wait_for(presented(address), DIAL_S)
            if name_of(public_bytes(parse_certificate(certificate).public_key())) != invite.admin:  # type: ignore[arg-type]
                raise ConnectionError("somebody else than the admin answers")
            async with pinned(address, certificate, DIRECTORY_OPTIONS) as channel:
                return await AdminStub(channel).Redeem(request, timeout=REDEEM_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.PERMISSION_DENIED:
                raise InviteError(error.details() or "the admin refuses") from None
            failures.append(f"{address}: {error.details() or error.code().name}")
        except (OSError, asyncio.TimeoutError) as error:
            failures.append(f"{address}: {error or 'no answer in time'}")
    raise InviteError(f"the admin who invited you does not answer ({'; '.join(failures)}): try again when it is there")
