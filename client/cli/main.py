"""`petal`: generate, chat, look at a swarm, run a demo; `petal serve` starts a peer."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from ...protocol.directory.directory import DirectoryError
from ...protocol.private import ENVIRONMENT
from ...protocol.wire.sampling import SamplingError
from ..generation import Piece
from ..routing.connect import enter
from ..routing.peers import ConnectError
from ..routing.route import NoRoute
from ..session.stream import PeerError
from ..swarm import SwarmModel
from .explain import CAVEAT, explain, table
from .private import commands as private_swarms
from .report import speed_line
from .status import print_status, swarm_status

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")
swarm_app = typer.Typer(no_args_is_help=True, help="Look at a swarm; make private ones.")
app.add_typer(swarm_app, name="swarm")
swarm_app.add_typer(private_swarms)
console = Console(stderr=True)

EXPECTED = (ConnectError, DirectoryError, NoRoute, PeerError, SamplingError, ValueError)

Model = Annotated[str, typer.Argument(help="The model as its peers name it: hub id, path, or [b]demo[/b].")]
Peers = Annotated[
    list[str] | None,
    typer.Option(help="Any peer of the swarm: gRPC host:port or libp2p multiaddr.", envvar="PETAL_INITIAL_PEERS"),
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
        help="Who guesses ahead; never changes the text. [b]auto[/b], [b]ngram[/b] (the text's own repeats), "
        "[b]model[/b] (the one made for this model), a checkpoint, several with commas, or [b]none[/b]."
    ),
]
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


def _settings(
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


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    initial_peers: Peers = None,
    join: Join = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = 0,
    drafter: Drafter = "auto",
    budget: Budget = None,
    exact: Exact = False,
    allow_mixed: AllowMixed = False,
    ends: Ends = None,
    wait: Wait = None,
    raw: Annotated[bool, typer.Option(help="Continue the prompt as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a stream.")] = False,
    verbose: Verbose = False,
) -> None:
    """Answer one prompt."""
    settings = _settings(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, drafter, budget)

    def run() -> None:
        options = {"join": join, "exact": exact, "allow_mixed": allow_mixed, "trusted_ends": ends or (), "wait_s": wait}
        with SwarmModel.connect(model, initial_peers or [], **options) as swarm:
            talk = swarm.chat()
            pieces = (swarm.stream if raw else talk.send)(prompt, trace=verbose, **settings)
            if as_json:
                _print_json(pieces)
            else:
                shown = show(pieces, verbose)
                if verbose:
                    console.print(speed_line(shown))

    _guarded(run)


@app.command()
def chat(
    model: Model,
    initial_peers: Peers = None,
    join: Join = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Repetition = 1.0,
    seed: Seed = 0,
    drafter: Drafter = "auto",
    budget: Budget = None,
    exact: Exact = False,
    allow_mixed: AllowMixed = False,
    ends: Ends = None,
    wait: Wait = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    verbose: Verbose = False,
) -> None:
    """Talk with the model; /regen answers again, /exit or Ctrl-D ends."""
    settings = _settings(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, drafter, budget)

    def run() -> None:
        options = {"join": join, "exact": exact, "allow_mixed": allow_mixed, "trusted_ends": ends or (), "wait_s": wait}
        with SwarmModel.connect(model, initial_peers or [], **options) as swarm:
            converse(swarm, settings, system, verbose)

    _guarded(run)


@app.command()
def route(
    model: Model,
    initial_peers: Peers = None,
    join: Join = None,
    ends: Ends = None,
    explained: Annotated[bool, typer.Option("--explain", help="Say what each peer sees.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """The peers that a session would run through now."""

    def run() -> None:
        with SwarmModel.connect(model, initial_peers or [], join=join, trusted_ends=ends or ()) as swarm:
            stops = explain(swarm.route(), swarm.ends, local_head=False)
        if as_json:
            print(json.dumps(stops))
        elif explained:
            Console().print(table(stops), CAVEAT)
        else:
            print(" -> ".join(f"{stop['address']} [{stop['blocks'][0]}:{stop['blocks'][1]}]" for stop in stops))

    _guarded(run)


@app.command()
def forget(model: Model) -> None:
    """Accept other weights of MODEL: the next use pins those that the swarm serves by then."""
    from ..routing.pins import forget as forget_pins

    known = forget_pins(model)
    console.print(
        f"The weights of {model} are {'forgotten' if known else 'not pinned'}.", highlight=False, markup=False
    )


@swarm_app.command()
def status(
    initial_peers: Peers = None,
    join: Join = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Models, blocks covered, peers, free cache, throughput; which blocks nobody hosts."""

    async def look() -> dict[str, Any]:
        trust, directory = await enter(initial_peers or [], join)
        try:
            return await swarm_status(directory, trust)
        finally:
            await directory.close()

    def run() -> None:
        report = asyncio.run(look())
        if as_json:
            print(json.dumps(report))
        else:
            print_status(report, Console())

    _guarded(run)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Run a peer: the same as `petal-serve`."""
    program = peer_program()
    if program is None:
        console.print("[red]petal:[/red] peers need more packages: pip install 'petal-swarm\\[peer]'", highlight=False)
        raise typer.Exit(1)
    os.execv(program, [program, *context.args])


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def quantize(context: typer.Context) -> None:
    """Make a quantized checkpoint: `petal quantize MODEL --format aqlm|spqr|int4 --calibration FILE --out DIR`."""
    os.execv(sys.executable, [sys.executable, "-m", "petal.peer.quantize", *context.args])


@app.command()
def demo(
    prompt: Annotated[str, typer.Argument(help="What to ask.")] = "Explain how a bicycle stays upright.",
    chatting: Annotated[bool, typer.Option("--chat", help="Open a conversation instead.")] = False,
    peers: Annotated[int, typer.Option(min=1, max=30, help="Local peers to split the model over.")] = 3,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    drafter: Drafter = "auto",
) -> None:
    """Start three local peers that share one small model, and let them answer."""
    from .demo import run_demo

    settings = _settings(max_new_tokens, temperature, 0, 1.0, 0.0, 1.0, seed, drafter, None)
    _guarded(lambda: run_demo(prompt, peers, settings, chatting, console))


@app.command()
def distill(
    target: Annotated[str, typer.Argument(help="The model to draft for: hub id, path, or [b]demo[/b].")],
    out: Annotated[Path, typer.Option(help="Folder for the drafter; after an interruption, the same goes on.")],
    size: Annotated[str, typer.Option(help="Parameters at most, embedding included.")] = "16M",
    minutes: Annotated[float, typer.Option(min=0.01, help="How long it may take.")] = 20.0,
    data: Annotated[Path | None, typer.Option(help="Learn from this text, not from the target's dialogues.")] = None,
    gguf: Annotated[Path | None, typer.Option(help="Also write this file: Q8_0, half the size.")] = None,
    head: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the vocabulary to draft from, the most frequent tokens.")
    ] = 1.0,
    initial_peers: Peers = None,
    seed: Seed = 0,
) -> None:
    """Make a drafter for a model that has no small sibling: a small Llama that learns to say what the model says."""

    def run() -> None:
        try:
            from ..distill.run import Options, distill
            from ..distill.shape import parameters_of
        except ImportError as error:
            raise ValueError("training needs torch and transformers: pip install 'petal-swarm[models]'") from error
        peers = tuple(initial_peers or ())
        distill(Options(target, out, parameters_of(size), minutes, data, gguf, head, peers, seed))

    _guarded(run)


def peer_program() -> str | None:
    """Where `petal-serve` is: in this Python's environment, or on the path."""
    beside = os.path.join(os.path.dirname(sys.executable), "petal-serve")
    return beside if os.access(beside, os.X_OK) else shutil.which("petal-serve")


def show(pieces: Iterator[Piece], verbose: bool = False) -> list[Piece]:
    """Print the text as it comes; with `verbose` also which peers failed, and who took over."""
    shown = []
    try:
        for piece in pieces:
            shown.append(piece)
            for event in piece.events if verbose else ():
                console.print(f"\n[dim]{escape(str(event))}[/dim]", highlight=False, soft_wrap=True)
            print(piece.text, end="", flush=True)
    finally:
        print(flush=True)
    return shown


def converse(swarm: SwarmModel, settings: dict[str, Any], system: str | None, verbose: bool) -> None:
    """A conversation in the terminal."""
    talk = swarm.chat(system=system)
    console.print(f"[dim]Talking with {swarm.name}. /regen answers again, /exit or Ctrl-D ends.[/dim]")
    try:
        while True:
            text = console.input("[b cyan]you>[/b cyan] ").strip()
            if text == "/exit":
                return
            if not text:
                continue
            if text == "/regen":
                settings = {**settings, "seed": settings["seed"] + 1}
                pieces = talk.regenerate(trace=verbose, **settings)
            else:
                pieces = talk.send(text, trace=verbose, **settings)
            shown = show(pieces, verbose)
            if verbose:
                console.print(speed_line(shown))
    except EOFError:
        console.print()
    finally:
        talk.close()


def _print_json(pieces: Iterator[Piece]) -> None:
    """One object, also where the generation breaks off: then with the text so far and the reason."""
    collected: list[Piece] = []
    broken: Exception | None = None
    try:
        for piece in pieces:
            collected.append(piece)
    except EXPECTED as error:
        broken = error
    answer = {
        "text": "".join(piece.text for piece in collected),
        "ids": [token for piece in collected for token in piece.ids],
        "finish_reason": collected[-1].finish_reason if collected else None,
        "seconds": sum(piece.seconds for piece in collected),
        "events": [str(event) for piece in collected for event in piece.events],
    }
    print(json.dumps(answer if broken is None else {**answer, "error": str(broken)}))
    if broken:
        raise broken


def _guarded(run: Callable[[], None]) -> None:
    """One-line errors that say what to do; a stack trace would help nobody."""
    try:
        run()
    except EXPECTED as error:
        # What is in an error is never markup, and a line is a line however narrow the terminal is.
        console.print(f"[red]petal:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def main() -> None:
    app()
