"""`petal gateway` and `petal keys`: the door that other programs use, and who may come in."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...protocol.paths import data_dir
from .options import AllowMixed, Drafter, Ends, Exact, Join, Peers
from .terminal import console

if TYPE_CHECKING:
    from ..gateway.program import GatewayServer

PORT = 8100

keys_app = typer.Typer(no_args_is_help=True, help="API keys of a gateway: a file of their digests and limits.")


def keys_file() -> Path:
    """Where keys are kept unless another file is named."""
    return data_dir() / "gateway-keys.json"


KeysFile = Annotated[Path | None, typer.Option("--keys", help="The file; by default one of this user's.")]


def gateway(
    models: Annotated[list[str], typer.Argument(help="The models as their peers name them: hub id, path, or demo.")],
    initial_peers: Peers = None,
    join: Join = None,
    host: Annotated[str, typer.Option(help="Where to listen; others than this machine need --keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = PORT,
    keys: Annotated[Path | None, typer.Option(help="Serve those alone who have a key of this file.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="Of pages in browsers that may call.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file; with --tls-key the gateway speaks HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    running: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 64,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that wait at a time; the next gets 429.")] = 256,
    drafter: Drafter = "ngram",
    exact: Exact = False,
    allow_mixed: AllowMixed = False,
    ends: Ends = None,
) -> None:
    """Serve OpenAI's, Anthropic's and Ollama's APIs: editors, agents and libraries get a URL.

    petal gateway demo --initial-peers 192.0.2.7:31337

    petal gateway demo --join invitation.txt --host 0.0.0.0 --keys keys.json
    """
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key go together")
    need_packages()
    from ..gateway.application import GatewayLimits
    from ..gateway.keys import KeyRing, read_keys
    from ..gateway.program import GatewayServer, TlsFiles, served_model

    ring = KeyRing(read_keys(keys) if keys else ())
    tls = TlsFiles(tls_cert, tls_key) if tls_cert and tls_key else None

    def server() -> GatewayServer:
        served = [
            served_model(
                name,
                initial_peers or (),
                drafter,
                join=join,
                exact=exact,
                allow_mixed=allow_mixed,
                trusted_ends=ends or (),
            )
            for name in dict.fromkeys(models)
        ]
        return GatewayServer(served, ring, GatewayLimits(running, waiting), allow_origin or (), tls)

    async def announced(made: GatewayServer, url: str) -> None:
        print(url, flush=True)
        console.print(f"[b]{', '.join(models)}[/b] at {url}/v1 until Ctrl-C. Try:", highlight=False)
        console.print(curl_line(url, models[0], bool(keys)), highlight=False, soft_wrap=True, markup=False)
        for model in made.catalog:
            if model.lack:
                console.print(f"[yellow]{model.name} cannot be served yet:[/yellow] {model.lack}", highlight=False)

    asyncio.run(run_until_stopped(server, host, port, announced))


async def run_until_stopped(
    make: Callable[[], GatewayServer],
    host: str,
    port: int,
    announced: Callable[[GatewayServer, str], Awaitable[None]],
) -> None:
    """Serve until SIGINT or SIGTERM; streams have some seconds to end. Raises GatewayError, ConnectError."""
    server = make()
    loop = asyncio.get_running_loop()
    with contextlib.suppress(NotImplementedError):  # of Windows, where Ctrl-C ends the program at once
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
    running = asyncio.ensure_future(server.run(host, port))
    with contextlib.suppress(Exception):  # `running` raises it
        await announced(server, await server.started())
    await running


def need_packages() -> None:
    """Raises ValueError where what the extra `gateway` brings is missing."""
    try:
        importlib.import_module("..gateway.program", __package__)
    except ImportError as error:
        raise ValueError(f"a gateway needs more packages: pip install 'petal-swarm[gateway]' ({error})") from error


def curl_line(url: str, model: str, asks_key: bool = False) -> str:
    """A command that makes the model speak."""
    key = " -H 'Authorization: Bearer KEY'" if asks_key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Say hello."}}]}}'
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"


@keys_app.command()
def add(
    label: Annotated[str, typer.Argument(help="Whose key it is.")],
    keys: KeysFile = None,
    requests: Annotated[int | None, typer.Option(min=1, help="A minute; by default any number.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="A minute, read and written; by default any.")] = None,
    priority: Annotated[int, typer.Option(help="The higher waits in front.")] = 0,
    admin: Annotated[bool, typer.Option(help="May see what is for those who run the gateway.")] = False,
) -> None:
    """Make a key and print it: this once, since only its digest is kept."""
    need_packages()
    from ..gateway.keys import KeyRecord, add_key

    print(add_key(keys or keys_file(), KeyRecord(label, "", requests, tokens, priority, admin)))


@keys_app.command(name="list")
def list_keys(keys: KeysFile = None) -> None:
    """Labels and limits of the keys."""
    need_packages()
    from ..gateway.keys import read_keys

    for record in read_keys(keys or keys_file()):
        limits = {"requests/min": record.requests_per_minute, "tokens/min": record.tokens_per_minute}
        said = [f"{value} {name}" for name, value in limits.items() if value is not None]
        said += [f"priority {record.priority}"] * (record.priority != 0) + ["admin"] * record.admin
        print(record.label, ", ".join(said) or "no limits", sep="\t")


@keys_app.command()
def remove(label: str, keys: KeysFile = None) -> None:
    """Let the holder of a key in no more, from the gateway's next start on."""
    need_packages()
    from ..gateway.keys import remove_key

    remove_key(keys or keys_file(), label)
