"""What `petal-serve` was asked for."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from ..protocol.host import WILDCARDS, outward_host, with_port
from .limits.quotas import NO_QUOTAS, Quotas
from .limits.rates import USUAL_RATES, CallRates

# What a person may choose; which backend that is, `kernels/registry.py` says.
DEVICES = ("auto", "cpu", "cuda", "rocm", "mps", "xpu")
DTYPES = ("float32", "bf16")
DEFAULT_CACHE_TOKENS = 16384
QUANTS = ("none", "int8", "int4", "nf4", "gguf", "aqlm", "spqr", "fp8")


def check_device(device: str) -> None:
    """Raise ValueError for what is no device's name."""
    kind, colon, index = device.partition(":")
    if kind not in DEVICES or (colon and not (index.isascii() and index.isdigit() and kind in DEVICES[2:])):
        raise ValueError(
            f"there is no device {device!r}; choose {', '.join(DEVICES)}, or one of several such as cuda:1"
        )


@dataclass(frozen=True)
class ServeOptions:
    """One peer. `blocks` and `num_blocks` override the span that the peer would choose.

    quant: one of QUANTS, or None for what swarm, checkpoint and memory suggest; dtype: one of DTYPES, of what stays
    dense. device: one of DEVICES, one of several with its number ("cuda:1"). gpu_memory: the share of a card's memory
    that this peer may fill. host: an IP address. identity: a file, or None for this user's first that no peer runs as.
    cache_tokens: None for as many as DEFAULT_CACHE_TOKENS where memory allows.
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
    identity: Path | None = None
    device: str = "cpu"
    gpu_memory: float = 0.9
    dtype: str | None = None
    quant: str | None = "none"
    cache_tokens: int | None = None
    max_sessions: int = 64
    threads: int | None = None
    exact: bool = False
    publish_s: float = 5.0
    idle_s: float = 600.0
    grace_s: float = 30.0
    replay_bytes: int = 1 << 30
    quotas: Quotas = NO_QUOTAS
    rates: CallRates = USUAL_RATES

    def contradiction(self) -> str:
        """Which options exclude each other, and what to do; empty where none do."""
        if self.blocks is not None and self.num_blocks is not None:
            return "--blocks and --num-blocks contradict each other; give one of them"
        if self.join is not None and self.initial_peers:
            return "--join knows the swarm's addresses; leave --initial-peers out"
        if self.join is not None and self.relay:
            return "a private swarm has no libp2p to relay; leave --relay out"
        return ""

    def announced(self, port: int) -> str:
        """The host:port under which others reach this peer."""
        return self.announce or with_port(self._reachable_host(), port)

    def _reachable_host(self) -> str:
        if self.host not in WILDCARDS:
            return self.host
        return outward_host(socket.AF_INET6 if self.host == "::" else socket.AF_INET)
