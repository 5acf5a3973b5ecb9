"""What `petal-serve` was asked for."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

DTYPES = ("float32", "bf16")
QUANTS = ("none", "int8", "int4", "nf4", "gguf", "aqlm", "spqr")


def data_dir() -> Path:
    """Where identities are kept."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "petal"


@dataclass(frozen=True)
class ServeOptions:
    """One peer. `blocks` and `num_blocks` override the span that the peer would choose.

    quant: one of QUANTS, or None for what checkpoint and memory suggest; dtype: one of DTYPES, of what stays dense.
    """

    model: str
    blocks: range | None = None
    num_blocks: int | None = None
    host: str = "0.0.0.0"
    port: int = 0
    announce: str | None = None
    dht_port: int = 0
    initial_peers: tuple[str, ...] = ()
    identity: Path = field(default_factory=lambda: data_dir() / "identity")
    device: str = "cpu"
    dtype: str | None = None
    quant: str | None = "none"
    cache_tokens: int = 16384
    max_sessions: int = 64
    threads: int | None = None
    exact: bool = False
    publish_s: float = 5.0
    idle_s: float = 600.0
    grace_s: float = 30.0
    replay_bytes: int = 1 << 30

    def announced(self, port: int) -> str:
        """The host:port under which others reach this peer."""
        return self.announce or f"{self._reachable_host()}:{port}"

    def _reachable_host(self) -> str:
        if self.host not in ("0.0.0.0", "[::]", "::"):
            return self.host
        # Connecting a datagram socket sends nothing; it only asks the kernel which interface faces outwards.
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))
            except OSError:
                return "127.0.0.1"
            return str(probe.getsockname()[0])
