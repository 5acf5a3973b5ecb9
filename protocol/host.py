"""How others reach this machine."""

from __future__ import annotations

import errno
import ipaddress
import socket

# Documentation's own addresses: nobody has them, so the way to them is the default route.
_FAR = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
WILDCARDS = ("0.0.0.0", "::")


def outward_host(prefer: socket.AddressFamily = socket.AF_INET) -> str:
    """The address that faces outwards; without a default route any of an interface's; loopback where there is none."""
    families = sorted(_FAR, key=lambda family: family != prefer)
    for family in families:
        if address := _by_route(family):
            return address
    return next((address for family in families for address in _by_interface(family)), "127.0.0.1")


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach it."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def numeric(host: str) -> str:
    """The IP address that a host's name stands for. Raises ValueError."""
    try:
        return str(socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        raise ValueError(f"{host!r} is no host that this machine knows; give one of its IP addresses") from None


def with_port(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def listening_obstacle(host: str, port: int) -> str:
    """Why no server can listen there; empty where one can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            probe.listen(1)
    except OSError as error:
        return _OBSTACLES.get(error.errno or 0, error.strerror or str(error))
    return ""


_OBSTACLES = {
    errno.EADDRINUSE: "the port is in use",
    errno.EACCES: "ports below 1024 are not yours",
    errno.EADDRNOTAVAIL: "this machine has no such address",
    errno.EAFNOSUPPORT: "this machine has no IPv6",
}


def _by_route(family: socket.AddressFamily) -> str:
    # Connecting a datagram socket sends nothing; it only asks the kernel which interface that is.
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((_FAR[family], 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _by_interface(family: socket.AddressFamily) -> list[str]:
    import psutil  # few machines come here

    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = [a.address for name in up for a in psutil.net_if_addrs().get(name, ()) if a.family == family]
    return [a for a in sorted(found) if "%" not in a and not is_loopback(a)]  # with a % it is good on one link only
