"""`petal swarm list` and `leave`: the private swarms that this user administers or is a member of."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...protocol.paths import data_dir
from .terminal import console

commands = typer.Typer()


@dataclass(frozen=True)
class Held:
    """What a folder makes of this user in a swarm: its admin, or a member (as a client, or with a peer's identity)."""

    swarm: str
    role: str
    id: str
    until: str
    folder: str


@commands.command("list")
def list_swarms(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """The private swarms that this machine administers or is a member of."""
    found = sorted(_held(), key=lambda held: (held.swarm, held.role))
    if as_json:
        print(json.dumps([asdict(held) for held in found]))
    elif not found:
        console.print("None yet: `petal swarm init NAME` makes one, --join INVITATION joins one.", highlight=False)
    else:
        table = Table("swarm", "role", "id", "until")
        for held in found:
            table.add_row(held.swarm, held.role, held.id[:12], held.until)
        Console().print(table)


@commands.command()
def leave(swarm: Annotated[str, typer.Argument(help="The swarm, as `petal swarm list` names it.")]) -> None:
    """Give up this user's memberships of a swarm; an invitation lets you in again."""
    found = [held for held in _held() if held.swarm == swarm]
    if not found:
        raise ValueError(f"this user is no member of {swarm!r}; `petal swarm list` shows which there are")
    if kept := [held.folder for held in found if held.role == "admin"]:
        raise ValueError(f"this machine administers {swarm}: its keys are in {kept[0]}; move them away to give it up")
    for held in found:
        shutil.rmtree(held.folder)
    console.print(f"Left {swarm}: {len(found)} memberships are gone.", highlight=False)


def _held() -> Iterator[Held]:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    from ...protocol.private.membership import Membership

    home = data_dir()
    places = [("client", path) for path in home.glob("members/*/swarm.json")]
    places += [("peer", path) for path in home.glob("*.members/*/swarm.json")]
    places += [("admin", path) for path in home.glob("swarms/*/member/swarm.json")]
    for role, path in places:
        try:
            membership = Membership(path.parent)
            chain = x509.load_pem_x509_certificates((path.parent / "chain.pem").read_bytes())
        except (OSError, ValueError, KeyError):
            continue  # half written, or damaged: whoever uses it hears of it
        name = str(membership.root.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)
        until = f"{chain[0].not_valid_after_utc:%Y-%m-%d %H:%M}" if membership.valid else "not valid any more"
        folder = path.parent.parent if role == "admin" else path.parent
        swarm = folder.name if role == "admin" else name
        yield Held(swarm, role, membership.name, until, str(folder))
