"""How much of its steps a stream may bring before this peer has worked them off."""

from __future__ import annotations

import grpc

from ...protocol.wire.limits import WINDOW_BYTES
from .spec import SessionFailed


class CreditWindow:
    """Bytes of one stream: outstanding until their credit has gone back, and owed as soon as their step is through."""

    def __init__(self) -> None:
        self._outstanding = self._owed = 0

    def take(self, size: int) -> None:
        """A frame has come. Raises SessionFailed where it exceeds the window."""
        self._outstanding += size
        if self._outstanding > WINDOW_BYTES:
            raise SessionFailed(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._outstanding} bytes of steps are outstanding; the window is {WINDOW_BYTES}",
            )
        self._owed += size

    def give_back(self) -> int:
        """Credit to return now: in large pieces, so that a decode step costs no frame for it."""
        if self._owed < WINDOW_BYTES // 4:
            return 0
        owed, self._owed = self._owed, 0
        self._outstanding -= owed
        return owed

    def restart(self) -> None:
        """Another stream takes the place of the one before."""
        self._outstanding = self._owed = 0
