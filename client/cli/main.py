"""`petal`: generate, chat, look at a swarm, run a demo; `petal serve` starts a peer."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ...protocol import program
from ...protocol.program import show_version
from ..output import OutputChunk
from ..routing.connect import connect
from ..swarm import SwarmModel
from .conversation import Conversation, reader
from .explain import CAVEAT, explain, table
from .gateway import PORT, gateway, keys_app
from .launch import launch
from .memberships import commands as memberships
from .options import (
    AllowMixed,
    Budget,
    Drafter,
    DrafterDevice,
    Ends,
    Exact,
    Join,
    MaxNewTokens,
    MinP,
    Model,
    Peers,
    Repetition,
    Seed,
    Temperature,
    TopK,
    TopP,
    Verbose,
    Wait,
    settings_of,
)
from .private import commands as private_swarms
from .prompts import protect_prompt, read_prompt
from .report import speed_line
from .status import print_status, swarm_status
from .terminal import console, cut_note, peer_program, print_json, show

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich")
swarm_app = typer.Typer(no_args_is_help=True, help="Look at a swarm; make private ones.")


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", help="Say which version this is.", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Run a large language model together: peers host blocks, clients draft and the swarm verifies."""


app.add_typer(swarm_app, name="swarm")
swarm_app.add_typer(private_swarms)
swarm_app.add_typer(memberships)
app.add_typer(keys_app, name="keys")


def _connected(
    model: str,
    initial_peers: list[str] | None,
    join: str | None,
    exact: bool,
    allow_mixed: bool,
    ends: list[str] | None,
    wait: float | None,
    drafter_device: str,
) -> SwarmModel:
    return SwarmModel.connect(
        model,
        initial_peers or [],
        join=join,
        exact=exact,
        allow_mixed=allow_mixed,
        trusted_ends=ends or (),
        drafter_device=drafter_device,
        wait_s=wait,
    )


@app.command()
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(help="What to say to the model; - or nothing reads what is piped in.")
    ] = None,
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
    drafter_device: DrafterDevice = "cpu",
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
    text = read_prompt(prompt)
    settings = settings_of(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, drafter, budget)

    def chunks() -> Iterator[OutputChunk]:
        with _connected(model, initial_peers, join, exact, allow_mixed, ends, wait, drafter_device) as swarm:
            yield from (swarm.stream if raw else swarm.chat().send)(text, trace=verbose, **settings)

    if as_json:
        print_json(chunks())
        return
    shown = show(chunks(), verbose)
    if note := cut_note(shown):
        console.print(f"[dim]({note})[/dim]", highlight=False)
    if verbose and shown:
        console.print(speed_line(shown))


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
    drafter_device: DrafterDevice = "cpu",
    budget: Budget = None,
    exact: Exact = False,
    allow_mixed: AllowMixed = False,
    ends: Ends = None,
    wait: Wait = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    verbose: Verbose = False,
) -> None:
    """Talk with the model; /help lists what can be said beside messages, /exit or Ctrl-D ends."""
    settings = settings_of(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, drafter, budget)

    with _connected(model, initial_peers, join, exact, allow_mixed, ends, wait, drafter_device) as swarm:
        Conversation(swarm, settings, system, verbose).run(reader())


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
    with SwarmModel.connect(model, initial_peers or [], join=join, trusted_ends=ends or ()) as swarm:
        stops = explain(swarm.route(), swarm.trusted_ends, local_ends=False)
    if as_json:
        print(json.dumps(stops))
    elif explained:
        Console().print(table(stops), CAVEAT)
    else:
        print(" -> ".join(f"{stop['address']} [{stop['blocks'][0]}:{stop['blocks'][1]}]" for stop in stops))


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
        trust, directory = await connect(initial_peers or [], join)
        try:
            return await swarm_status(directory, trust)
        finally:
            await directory.close()

    report = asyncio.run(look())
    if as_json:
        print(json.dumps(report))
    else:
        print_status(report, Console())


app.command()(gateway)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(launch)


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
    serving: Annotated[bool, typer.Option("--serve", help="Keep a gateway up instead, until Ctrl-C.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the gateway; 0 takes any that is free.")] = PORT,
    peers: Annotated[int, typer.Option(min=1, max=30, help="Local peers to split the model over.")] = 3,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    drafter: Drafter = "auto",
) -> None:
    """Start three local peers that share one small model, and let them answer."""
    from .demo import run_demo, serve_demo

    if serving:
        serve_demo(peers, port, console)
        return
    settings = settings_of(max_new_tokens, temperature, 0, 1.0, 0.0, 1.0, seed, drafter, None)
    run_demo(prompt, peers, settings, chatting, console)


@app.command()
def distill(
    target: Annotated[str, typer.Argument(help="The model to draft for: hub id, path, or demo.")],
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
    try:
        from ..distill.run import Options, distill
        from ..distill.shape import parameters_of
    except ImportError as error:
        raise ValueError("training needs more packages: pip install 'petal-swarm[distill]'") from error
    peers = tuple(initial_peers or ())
    distill(Options(target, out, parameters_of(size), minutes, data, gguf, head, peers, seed))


def main(arguments: list[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else arguments
    program.run(app, "petal", protect_prompt(given), alone=arguments is None)
