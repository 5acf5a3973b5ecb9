"""What each peer of a route sees, for people and machines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from ..routing.route import Route
from ..routing.trusted_ends import TrustedEnds


def explain(route: Route, ends: TrustedEnds, local_ends: bool) -> list[dict[str, Any]]:
    """What each peer of a route sees."""
    stops = []
    for stop in route:
        first, last = stop.blocks.start == 0, stop.blocks.stop == stop.peer.n_blocks
        seen = []
        if first:
            seen.append("embeddings of your tokens" if local_ends else "your prompt as tokens")
        if last:
            seen.append("last hidden states" if local_ends else "your prompt and the answer as tokens")
        seen.append("activations" if not (first or last) else "activations of its blocks")
        stops.append(
            {
                "peer_id": stop.peer.peer_id,
                "address": stop.peer.addresses[0],
                "blocks": [stop.blocks.start, stop.blocks.stop],
                "labels": sorted(ends.of(stop.peer)),
                "sees": seen,
            }
        )
    return stops


def table(stops: Iterable[dict[str, Any]]) -> Table:
    """For people."""
    shown = Table("peer", "blocks", "labels", "sees")
    for stop in stops:
        start, end = stop["blocks"]
        shown.add_row(stop["peer_id"][-8:], f"{start}:{end}", " ".join(stop["labels"]) or "-", ", ".join(stop["sees"]))
    return shown


# What the table cannot say in a word.
CAVEAT = "Whoever has the model can recover text from activations and embeddings. All of them see your address."
