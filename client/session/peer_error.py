"""What a peer refused, or how it failed."""

from __future__ import annotations

import grpc

_OUR_FAULT = frozenset(
    {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.PERMISSION_DENIED}
)


class PeerError(RuntimeError):
    """A peer refused or failed; the message is one sentence that names it."""

    def __init__(self, peer: str, code: grpc.StatusCode, reason: str, peer_id: str = "") -> None:
        super().__init__(f"peer {peer}: {reason}")
        self.code = code
        self.peer_id = peer_id

    @property
    def busy(self) -> bool:
        """It has no room now."""
        return self.code == grpc.StatusCode.RESOURCE_EXHAUSTED

    @property
    def gone(self) -> bool:
        """It cannot be reached."""
        return self.code == grpc.StatusCode.UNAVAILABLE

    @property
    def replaceable(self) -> bool:
        """Whether another peer may do what this one could not: the session itself is not at fault."""
        return bool(self.peer_id) and self.code not in _OUR_FAULT
