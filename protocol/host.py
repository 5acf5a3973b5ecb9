"""How others reach this machine."""

from __future__ import annotations

import socket


def outward_host() -> str:
    """The address of the interface that faces outwards; loopback where none does."""
    # Connecting a datagram socket sends nothing; it only asks the kernel which interface that is.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
