"""Invitations: one paste-ready line, a JSON Web Token that its admin has signed and alone redeems."""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jwt

from ..directory.records import is_address
from ..errors import PetalError
from ..trust.tls_key import TlsKey, name_of
from .certificates import ROLES

MAX_USES = 10_000
MAX_TOKEN_BYTES = 8192
_ALGORITHM = "ES256"
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class InviteError(PetalError, ValueError):
    """Why an invitation is of no use, in one sentence."""


@dataclass(frozen=True)
class Invite:
    """What an invitation says. `admin` is the name of the admin's key, `root` the fingerprint of the swarm's root."""

    id: str
    swarm: str
    root: str
    admin: str
    addresses: tuple[str, ...]
    role: str
    labels: Mapping[str, str]
    uses: int
    expires_at: float

    @classmethod
    def new(
        cls,
        swarm: str,
        root: str,
        admin: TlsKey,
        addresses: Sequence[str],
        role: str,
        labels: Mapping[str, str],
        uses: int,
        lifetime_s: float,
    ) -> Invite:
        """Raises InviteError."""
        if role not in ROLES or not 1 <= uses <= MAX_USES or lifetime_s <= 0:
            raise InviteError(f"an invitation is for 1 to {MAX_USES} uses as {', '.join(ROLES)}, and for some time")
        admin_name = name_of(admin.public_key)
        expires_at = time.time() + lifetime_s
        return cls(
            secrets.token_urlsafe(16), swarm, root, admin_name, tuple(addresses), role, dict(labels), uses, expires_at
        )

    def token(self, admin: TlsKey) -> str:
        """The line to paste."""
        claims = {
            "jti": self.id,
            "sub": self.swarm,
            "root": self.root,
            "iss": self.admin,
            "at": self.addresses,
            "role": self.role,
            "labels": self.labels,
            "uses": self.uses,
            "exp": int(self.expires_at),
        }
        return jwt.encode(claims, admin.key, _ALGORITHM)


def verify_token(token: str, admin: TlsKey) -> Invite:
    """What this very admin wrote and may redeem. Raises InviteError."""
    invite = _parse(token, admin)
    if invite.admin != name_of(admin.public_key):
        raise InviteError("this invitation is another admin's")
    return invite


def read_token(text: str) -> tuple[str, Invite]:
    """The token that a person gave, or whose file they named, and what it claims. Raises InviteError."""
    token = text.strip()
    if token.count(".") != 2 or os.path.exists(token):
        try:
            token = Path(text).read_text().strip()
        except (OSError, ValueError) as error:
            raise InviteError("the invitation is neither a token nor a file that holds one") from error
    return token, _parse(token, None)


def _parse(token: str, admin: TlsKey | None) -> Invite:
    """Only the admin can check its signature; joiners check the root that a token names."""
    if len(token) > MAX_TOKEN_BYTES:
        raise InviteError(f"an invitation has at most {MAX_TOKEN_BYTES} characters")
    try:
        if admin:
            claims = jwt.decode(token, admin.key.public_key(), [_ALGORITHM])
        else:
            claims = jwt.decode(token, options={"verify_signature": False, "verify_exp": False})
        return _invite(claims)
    except jwt.ExpiredSignatureError:
        raise InviteError("this invitation has expired; ask for a new one") from None
    except (jwt.InvalidTokenError, KeyError, TypeError, ValueError):
        raise InviteError("this is no invitation of that swarm's admin; paste the whole line") from None


def _invite(claims: Mapping[str, Any]) -> Invite:
    texts = [claims[name] for name in ("jti", "sub", "root", "iss", "role")]
    addresses, labels = claims["at"], claims["labels"]
    if not all(isinstance(text, str) and len(text) <= 256 for text in [*texts, *labels, *labels.values()]):
        raise ValueError
    if not 1 <= len(addresses) <= 8 or not all(is_address(address) for address in addresses):
        raise ValueError
    token_id, swarm, root, admin, role = texts
    if not _FINGERPRINT.fullmatch(root):  # the folder of a membership is named after it
        raise ValueError
    return Invite(
        token_id, swarm, root, admin, tuple(addresses), role, labels, int(claims["uses"]), float(claims["exp"])
    )
