"""What a peer refused, or how it failed, and when its word is taken for true."""

from __future__ import annotations

import grpc

from ...protocol import petal_pb2 as pb
from ...protocol.errors import PetalError
from ...protocol.host import is_loopback

# What a peer says of the request; all else says that the peer itself is in no state to serve it.
_REFUSALS = frozenset(
    {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED}
)


class PeerError(PetalError, RuntimeError):
    """A peer refused or failed; the message is one sentence that names it."""

    def __init__(self, peer: str, code: grpc.StatusCode, reason: str, peer_id: str = "", place: str = "") -> None:
        """`place`: where the peer is, the same for all peers of one machine."""
        super().__init__(f"peer {peer}: {reason}")
        self.code = code
        self.peer_id = peer_id
        self.place = place

    @property
    def busy(self) -> bool:
        """It has no room now."""
        return self.code == grpc.StatusCode.RESOURCE_EXHAUSTED

    @property
    def gone(self) -> bool:
        """It cannot be reached."""
        return self.code == grpc.StatusCode.UNAVAILABLE

    @property
    def passing(self) -> bool:
        """It may serve the same soon. INTERNAL is gRPC's own word, for streams that never began."""
        return self.busy or self.gone or self.code == grpc.StatusCode.INTERNAL

    @property
    def refusal(self) -> bool:
        """It says that the session or the step is at fault."""
        return self.code in _REFUSALS

    @property
    def replaceable(self) -> bool:
        """Whether one peer failed, so that another may do better."""
        return bool(self.peer_id)


class Refusals:
    """Who refused one request. What a single peer says may be a lie; what two of different identity and place say
    alike is true."""

    def __init__(self) -> None:
        self._errors: list[PeerError] = []

    @property
    def peers(self) -> set[str]:
        return {error.peer_id for error in self._errors}

    @property
    def first(self) -> PeerError | None:
        return self._errors[0] if self._errors else None

    def add(self, error: PeerError) -> bool:
        """Whether that settles it: somebody else has said the same."""
        alike = [other for other in self._errors if other.code == error.code]
        self._errors.append(error)
        return any(other.peer_id != error.peer_id and other.place != error.place for other in alike)


def place_of(record: pb.PeerRecord) -> str:
    """Its host; on this machine, where everybody is a neighbour, its port as well."""
    address = record.addresses[0] if record.addresses else ""
    host = address.rpartition(":")[0]
    return address if is_loopback(host) else host
