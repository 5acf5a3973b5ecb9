"""What `petal-serve` was asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..protocol.host import outward_host
from ..protocol.paths import data_dir
from .limits.quotas import NO_QUOTAS, Quotas

DTYPES = ("float32", "bf16")
QUANTS = ("none", "int8", "int4", "nf4", "gguf", "aqlm", "spqr")


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
    relay: bool = False
    initial_peers: tuple[str, ...] = ()
    join: str | None = None
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
    quotas: Quotas = NO_QUOTAS

    def announced(self, port: int) -> str:
        """The host:port under which others reach this peer."""
        return self.announce or f"{self._reachable_host()}:{port}"

    def _reachable_host(self) -> str:
        return outward_host() if self.host in ("0.0.0.0", "[::]", "::") else self.host
