"""Everything that is let in, crashes or leaks under attack: `python -m tests.attack --json [--quick]`.

Bars: at least 1,000 forgeries tried and none accepted, 100,000 malformed inputs to calls and a
quarter as many to parsers without a crash, no page leaked; with --quick a tenth of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.support.private_swarms import private_swarm
from tests.support.swarms import NO_RATES, local_swarm
from tests.support.tiny import tiny_llama
from tests.support.wire import Wire, released

from . import live
from .forgeries import forge
from .fuzz import Fuzz
from .stalls import oversized, stalls
from .tally import Tally

FORGERIES, INPUTS, SESSIONS = 1000, 100_000, 10_000
FUZZ_S = 600.0


async def attack(tally: Tally, fuzz: Fuzz, sessions: int) -> dict[str, Any]:
    with TemporaryDirectory(prefix="petal-attack-") as folder:
        forge(tally, Path(folder))
        fuzz.parsers(Path(folder), 0.25)
    async with (
        # Refused for their number, most attacks would meet no other check.
        private_swarm(tiny_llama(), [range(0, 4)], rates=NO_RATES) as private,
        local_swarm(tiny_llama(), [range(0, 4), range(2, 4)], rates=NO_RATES) as public,
        Wire(public.peers[0]) as wire,
        Wire(public.peers[1]) as tail,
    ):
        stalling = asyncio.create_task(stalls(tally, tail))
        for part in (live.strangers, live.invitations, live.revoked, live.renewals):
            await part(tally, private)
        await live.hijacks(tally, wire)
        await live.named_addresses(tally, wire)
        await oversized(tally, wire)
        opened = await live.flood(wire, sessions)
        await fuzz.calls(wire, private, 0.8)
        await fuzz.streams(wire, tail, 0.2)
        await stalling
        leaked = await asyncio.gather(*(kept(end) for end in (wire, tail)))
    return {"sessions_dropped": opened, "leaked_pages": sum(leaked)}


async def kept(wire: Wire) -> int:
    """Pages that nobody has, and that are not free, of a peer that still serves."""
    assert wire.peer.blocks.start or (await wire.prefilled([1, 5, 9]))[1] >= 0
    wire.close_streams()
    await released(wire.peer)
    return wire.peer.engine.cache.n_pages - wire.peer.engine.cache.free_pages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="kept for symmetry: the last line always is JSON")
    parser.add_argument("--quick", action="store_true", help="a tenth")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    scale = 10 if options.quick else 1
    tally = Tally(rounds=100 // scale, random=random.Random(options.seed))
    fuzz = Fuzz(tally, INPUTS // scale, FUZZ_S / scale)
    started = time.monotonic()
    found = asyncio.run(attack(tally, fuzz, SESSIONS // scale))
    for name, tried in tally.tried.items():
        print(f"{tried:6} tried, {tally.accepted[name]} accepted   {name}", file=sys.stderr)
    for name, count in fuzz.inputs.items():
        print(f"{count:6} malformed inputs   {name}", file=sys.stderr)
    for crash in fuzz.crashes[:20]:
        print(f"CRASH {crash}", file=sys.stderr)
    figures = {
        "forgeries_tried": sum(tally.tried.values()),
        "forgeries_accepted": sum(tally.accepted.values()),
        "fuzz_inputs": sum(fuzz.inputs.values()),
        "crashes": len(fuzz.crashes),
        **found,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(json.dumps(figures))
    good = figures["forgeries_tried"] * scale >= FORGERIES and figures["fuzz_inputs"] * scale >= INPUTS
    sys.exit(0 if good and not any(figures[bad] for bad in ("forgeries_accepted", "crashes", "leaked_pages")) else 1)


if __name__ == "__main__":
    main()
