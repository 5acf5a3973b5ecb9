"""Who may call: by key, and by the page and the name under which a browser came."""

from __future__ import annotations

from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, BaseUser
from starlette.requests import HTTPConnection, Request

from ...protocol.errors import PetalError
from ...protocol.host import is_loopback
from .errors import ApiError
from .keys import Caller, KeyRing

# Who may ask without a key whether the gateway is up.
OPEN_PATHS = frozenset({"/health"})


class Refusal(AuthenticationError, PetalError):
    """An ApiError on its way through Starlette's middleware."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self.error = error


class KnownCaller(BaseUser):
    """A caller in Starlette's words."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller

    @property
    def is_authenticated(self) -> bool:
        return True

    @property
    def display_name(self) -> str:
        return self.caller.record.label


class Guard(AuthenticationBackend):
    """A gateway without keys serves this machine's programs, and no page of another origin that a browser shows:
    neither one that posts across origins, nor one whose name was made to mean this machine."""

    def __init__(self, keys: KeyRing, origins: frozenset[str] = frozenset()) -> None:
        """`origins`: of pages that may call."""
        self._keys = keys
        self._origins = origins

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, BaseUser] | None:
        """Raises Refusal."""
        if conn.url.path in OPEN_PATHS or conn.scope.get("method") == "OPTIONS":
            return None
        self._check_origin(conn)
        caller = self._keys.find(_key_of(conn))
        if caller is None:
            word = "this API key is not known" if _key_of(conn) else "this gateway asks for an API key"
            raise Refusal(ApiError(HTTPStatus.UNAUTHORIZED, word, code="invalid_api_key"))
        scopes = ["caller", "admin"] if caller.record.admin else ["caller"]
        return AuthCredentials(scopes), KnownCaller(caller)

    def _check_origin(self, conn: HTTPConnection) -> None:
        host = conn.headers.get("host", "")
        if not self._keys.asks and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            raise Refusal(ApiError(HTTPStatus.FORBIDDEN, f"{host[:80]!r} is no name of a gateway without keys"))
        origin = conn.headers.get("origin")
        if origin is None or origin in self._origins or urlsplit(origin).netloc == host:
            return
        raise Refusal(
            ApiError(HTTPStatus.FORBIDDEN, f"pages of {origin[:80]!r} may not call; --allow-origin lets them")
        )


def caller_of(request: Request) -> Caller:
    user = request.user
    assert isinstance(user, KnownCaller)
    return user.caller


def _key_of(conn: HTTPConnection) -> str:
    kind, _, token = conn.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else conn.headers.get("x-api-key", "").strip()
