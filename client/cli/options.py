"""Options that several commands of `petal` share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ...protocol.directory.addresses import check_peer
from ...protocol.private import ENVIRONMENT
from .prompts import check_drafter

Model = Annotated[str, typer.Argument(help="The model as its peers name it: hub id, path, or demo.")]


def _check_peers(peers: list[str] | None) -> list[str] | None:
    for peer in peers or ():
        try:
            check_peer(peer)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return peers


Peers = Annotated[
    list[str] | None,
    typer.Option(
        help="Any peer of the swarm: gRPC host:port or libp2p multiaddr.",
        envvar="PETAL_INITIAL_PEERS",
        callback=_check_peers,
    ),
]
Join = Annotated[
    str | None, typer.Option(envvar=ENVIRONMENT, help="Of a private swarm: an invitation, or a file that holds it.")
]
Ends = Annotated[
    list[str] | None,
    typer.Option("--ends", help="A label, such as lab=oxford, that the peers of the first and last block must have."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens at most.")]
Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option(min=0, help="0 is off.")]
TopP = Annotated[float, typer.Option(help="1 is off.")]
MinP = Annotated[float, typer.Option(help="0 is off.")]
Repetition = Annotated[float, typer.Option(help="1 is off.")]
Drafter = Annotated[
    str,
    typer.Option(
        callback=check_drafter,
        help="Who guesses ahead; never changes the text. auto, ngram (the text's own repeats), "
        "model (the one made for this model), a checkpoint, several with commas, or none.",
    ),
]
DrafterDevice = Annotated[str, typer.Option(help="Where draft models compute: cpu, cuda, or a card such as cuda:1.")]
Budget = Annotated[int | None, typer.Option(min=0, help="Tokens to draft a round; by default what pays most.")]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same text.")]
Exact = Annotated[bool, typer.Option(help="Only peers that promise the same bits in any batch, tree or chunk.")]
AllowMixed = Annotated[
    bool, typer.Option("--allow-mixed", help="Mix dtypes where no one dtype has every block; the text then varies.")
]
Wait = Annotated[
    float | None,
    typer.Option(min=0, help="Seconds to wait for blocks that nobody hosts: by default 0 at the start, 30 later."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Times of every hop, at the end; peers that failed, as it happens.")
]


def settings_of(
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition: float,
    seed: int,
    drafter: str,
    budget: int | None,
) -> dict[str, Any]:
    """What the options say, by the names that `SwarmModel` knows."""
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition,
        "seed": seed,
        "drafter": drafter,
        "budget": budget,
    }
