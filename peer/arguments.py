"""What `petal-serve` can be told, with what is wrong where it makes no sense."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from ..protocol.directory.addresses import check_address, check_peer
from ..protocol.host import numeric
from ..protocol.private import ENVIRONMENT
from .options import DTYPES, QUANTS, check_device

T = TypeVar("T")
# Every option is an environment variable, too.
PREFIX = "PETAL_SERVE"
_CORES = os.cpu_count() or 1


def _checked(check: Callable[[T], object]) -> Callable[[T | None], T | None]:
    """A callback of typer's: the check's ValueError is said of the option."""

    def callback(value: T | None) -> T | None:
        if value is not None:
            try:
                check(value)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error
        return value

    return callback


def _option(help: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, show_envvar=False, **more)


def _choice(what: str, choices: tuple[str, ...]) -> Callable[[str | None], str | None]:
    def check(value: str) -> None:
        if value not in choices:
            raise ValueError(f"there is no {what} {value!r}; choose {' or '.join(choices)}")

    return _checked(check)


def parse_blocks(text: str) -> range:
    """A span as people type it. Raises ValueError."""
    start, colon, end = text.partition(":")
    numbers = start.isascii() and start.isdigit() and end.isascii() and end.isdigit()
    if not (colon and numbers and int(start) < int(end)):
        raise ValueError(f"{text!r} is no span; give a half-open range such as 0:10, which has the blocks 0 to 9")
    return range(int(start), int(end))


def _peers(peers: list[str]) -> None:
    for peer in peers:
        check_peer(peer)


def _model(model: str) -> None:
    if not model.strip():
        raise ValueError("it is empty; give a hub id, a folder, a GGUF file, or demo")


Model = Annotated[
    str,
    typer.Argument(
        help="Hub id, local safetensors folder, GGUF file, or demo.",
        callback=_checked(_model),
        show_envvar=False,
    ),
]
Blocks = Annotated[str | None, _option("Host exactly this span, e.g. 0:10.", callback=_checked(parse_blocks))]
NumBlocks = Annotated[int | None, _option("Host this many blocks, where they help most.", min=1)]
InitialPeers = Annotated[
    list[str] | None,
    _option(
        "Join through these: gRPC host:port or libp2p multiaddrs.",
        callback=_checked(_peers),
        envvar=["PETAL_INITIAL_PEERS", f"{PREFIX}_INITIAL_PEERS"],
    ),
]
Join = Annotated[
    str | None, _option("Of a private swarm: an invitation, or a file that holds it.", envvar=[ENVIRONMENT])
]
Host = Annotated[str, _option("Interface to listen on; :: is IPv6, too.", callback=_checked(numeric))]
Port = Annotated[int, _option("gRPC port; 0 takes the last one again, or a free one.", min=0, max=65535)]
Announce = Annotated[str | None, _option("host:port that others reach this peer at.", callback=_checked(check_address))]
DhtPort = Annotated[int, _option("DHT port; 0 takes the last one again, or a free one.", min=0, max=65535)]
Relay = Annotated[bool, _option("Pass libp2p traffic of others on, and be reached through others that do.", "--relay")]
IdentityFile = Annotated[
    Path | None, _option("Identity file, made if missing; by default the first of yours that no peer runs as.")
]
Device = Annotated[
    str,
    _option(
        "Where to compute: cpu, cuda, cuda:1 and so on; auto: a GPU if there is one.", callback=_checked(check_device)
    ),
]
GpuMemory = Annotated[float, _option("Share of a GPU's memory that this peer may fill.", min=0.05, max=1.0)]
Dtype = Annotated[
    str | None,
    _option(
        "Of dense weights: float32, or bf16 for half the memory; unpacks quantized ones.",
        callback=_choice("dtype", DTYPES),
    ),
]
Quant = Annotated[
    str | None,
    _option(
        f"Of the blocks' weights: {', '.join(QUANTS)}; by default as the swarm serves them, as stored, or as fits.",
        callback=_choice("weight format", QUANTS),
    ),
]
CacheTokens = Annotated[int | None, _option("Size of the KV cache in tokens; 16384 where they fit.", min=16)]
MaxSessions = Annotated[int, _option("Sessions at a time.", min=1, max=1 << 20)]
Threads = Annotated[int | None, _option("Compute threads; all cores by default.", min=1, max=_CORES)]
Grace = Annotated[
    float, _option("Seconds that running sessions get to move elsewhere before this peer leaves.", min=0, max=86400)
]
ReplayMib = Annotated[
    int, _option("Memory for outputs that are sent again where another peer fails.", min=0, max=1 << 24)
]
QuotasFile = Annotated[
    Path | None, _option("JSON file: what clients may take, by role and label, and weights of labs.")
]
Exact = Annotated[
    bool, _option("Promise equal bits for a row in any batch, tree or chunk; refuse to start otherwise.", "--exact")
]
JsonLogs = Annotated[bool, _option("Log events as JSON lines.", "--json")]
