"""`petal swarm init`, `invite`, `admin`, `members`, `revoke`, `rotate`: private swarms, on the machine of an admin."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ...protocol.directory.addresses import check_address
from ...protocol.host import is_loopback, outward_host, with_port
from .status import SHORT

# What only admins need is imported late: `petal --help` answers at once.
if TYPE_CHECKING:
    from ...protocol.private.authority import Authority
    from ...protocol.private.ledger import Issue

commands = typer.Typer()
console = Console(stderr=True)

PORT = 31400
SEEN_S = 2.0
_UNITS = {"m": 60, "h": 3600, "d": 86400}

Swarm = Annotated[str | None, typer.Argument(help="The swarm; needed where this machine administers several.")]
Address = Annotated[
    str | None, typer.Option(help="host:port that joiners reach this machine at; members use the port above it.")
]


@commands.command()
def init(
    name: Annotated[str, typer.Argument(help="Of the new swarm.")],
    address: Address = None,
) -> None:
    """Make a private swarm: its root key, and this machine as its first admin."""
    from ...protocol.private.authority import Authority

    authority = Authority.init(name, _reachable(address))
    root = authority.folder / "root.key"
    console.print(
        f"The swarm [b]{name}[/b] has the root key [cyan]{root}[/cyan]\n"
        "Whoever has it rules the swarm: move it to a place that is offline; only admins need it, when they come, "
        "go or rotate.\n"
        f"Now leave [cyan]petal swarm admin {name}[/cyan] running here ({authority.address}), and invite others: "
        f"[cyan]petal swarm invite {name}[/cyan]",
        highlight=False,
        soft_wrap=True,
    )


@commands.command()
def invite(
    name: Swarm = None,
    role: Annotated[str, typer.Option(help="peer, client or admin.")] = "peer",
    uses: Annotated[int, typer.Option(min=1, help="Machines that may join with it.")] = 1,
    expires: Annotated[str, typer.Option(help="For how long it is good, such as 30m, 12h or 7d.")] = "7d",
    label: Annotated[list[str] | None, typer.Option(help="What routes and quotas go by, such as lab=oxford.")] = None,
) -> None:
    """Print one line that lets others join; only this admin redeems it."""
    from ...protocol.private.certificates import parse_label

    labels = dict(parse_label(text) for text in label or ())
    print(_authority(name).invite(role, labels, uses, _seconds(expires)))


@commands.command()
def admin(
    name: Swarm = None,
    host: Annotated[str, typer.Option(help="Interface to listen on.")] = "0.0.0.0",
    join: Annotated[str | None, typer.Option(help="Become an admin first: an invitation of --role admin.")] = None,
    address: Address = None,
) -> None:
    """Let invited machines join and members renew. While it is away nobody joins, and all else goes on."""

    async def serve() -> None:
        from ...protocol.private.admin import AdminServer
        from ...protocol.private.joining import join_as_admin

        authority = await join_as_admin(join, _reachable(address)) if join else _authority(name)
        if address and not join:
            authority.move_to(_reachable(address))
        server = AdminServer(authority, host)
        await server.start()
        console.print(f"Admin of {server.authority.swarm} at {server.authority.address}. Ctrl-C ends.", highlight=False)
        leaving = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, leaving.set)
        await leaving.wait()
        await server.stop()

    asyncio.run(serve())


@commands.command()
def members(
    name: Swarm = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Whom this admin has let in."""
    authority = _authority(name)
    newest = {issue.name: issue for issue in authority.ledger.issues()}
    seen = asyncio.run(_seen(authority))
    if as_json:
        said = []
        for issue in newest.values():
            host, last_seen = seen.get(issue.name, ("", None))
            said.append(vars(issue) | {"serial": f"{issue.serial:x}", "host": host, "last_seen": last_seen})
        print(json.dumps(said))
    else:
        Console().print(_table(newest.values(), seen))


@commands.command()
def revoke(
    member: Annotated[str, typer.Argument(help="The id, or its beginning, as `petal swarm members` shows it.")],
    name: Annotated[str | None, typer.Option("--swarm", help="Where this machine administers several.")] = None,
) -> None:
    """Put a member out, with everybody it has let in if it is an admin. Its running sessions are cut."""
    authority = _authority(name)
    found = {issue.name for issue in authority.ledger.issues() if issue.name.startswith(member)}
    if len(found) != 1:
        raise ValueError(f"{len(found)} members have an id that begins with {member!r}; give one of `members`")
    issues = authority.revoke(found.pop())
    console.print(f"Revoked {issues[0].role} {issues[0].name[:SHORT]}.", highlight=False)
    told = asyncio.run(_tell(authority))
    console.print(f"{told} members know already; the others hear of it within seconds.", highlight=False)


@commands.command()
def rotate(name: Swarm = None) -> None:
    """Give this admin a new key, signed by the root. Members stay; invitations that are out are void."""
    authority = _authority(name)
    authority.rotate()
    console.print(f"The admin of {authority.swarm} has a new key; put the root key away again.", highlight=False)


async def _tell(authority: Authority) -> int:
    from ...protocol.private.gossip import tell_all

    return await tell_all(authority.membership)


def _reachable(address: str | None) -> str:
    if address is None:
        address = with_port(outward_host(), PORT)
        if is_loopback(outward_host()):
            console.print(
                f"This machine has no network: only programs on it reach {address}; --address says otherwise.",
                highlight=False,
                soft_wrap=True,
            )
    if int(check_address(address).rpartition(":")[2]) > 65534:
        raise ValueError(f"{address!r} leaves no port above it for members; give one below 65535")
    return address


def _authority(name: str | None) -> Authority:
    from ...protocol.private.authority import Authority, folder_of

    if name is None:
        swarms = folder_of("any").parent
        names = sorted(path.parent.name for path in swarms.glob("*/admin.json")) if swarms.exists() else []
        if len(names) != 1:
            if not names:
                raise ValueError("this machine administers no swarm; `petal swarm init NAME` makes one")
            raise ValueError(f"name the swarm: this machine administers {', '.join(names)}")
        name = names[0]
    folder = folder_of(name)
    if not (folder / "admin.json").exists():
        raise ValueError(f"this machine does not administer {name}; `petal swarm init {name}` makes a new swarm")
    return Authority(folder)


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,6})([mhd])", text)
    if not found:
        raise ValueError(f"{text!r} is no time such as 30m, 12h or 7d")
    return float(found[1]) * _UNITS[found[2]]


async def _seen(authority: Authority) -> dict[str, tuple[str, float]]:
    """Host and time of the newest record of every peer, by its id as a member; nothing where no member answers."""
    from ...protocol.directory.directory import DirectoryError, GrpcDirectory
    from ...protocol.trust.trust import member_name

    membership = authority.membership
    addresses = [authority.members_at, *membership.addresses]
    try:
        records = await GrpcDirectory(addresses, trust=membership, timeout_s=SEEN_S).list()
    except DirectoryError:
        return {}
    return {
        member_name(record): (record.addresses[0].rpartition(":")[0] if record.addresses else "", record.version / 1e3)
        for record in records
    }


def _table(issues: Iterable[Issue], seen: Mapping[str, tuple[str, float]]) -> Table:
    table = Table("id", "role", "labels", "host", "last seen", "until", "")
    for issue in issues:
        labels = " ".join(f"{label}={value}" for label, value in issue.labels.items())
        until = time.strftime("%Y-%m-%d %H:%M", time.localtime(issue.not_after))
        host, when = seen.get(issue.name, ("", 0.0))
        last = f"{max(0.0, time.time() - when):.0f} s ago" if when else ""
        revoked = "[red]revoked[/red]" if issue.revoked else ""
        table.add_row(issue.name[:SHORT], issue.role, labels, host, last, until, revoked)
    return table
