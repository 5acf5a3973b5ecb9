"""What a generation cost: speed, drafting, and the way through the peers."""

from __future__ import annotations

from ..output import OutputChunk


def plain_report(chunks: list[OutputChunk], peers: int) -> str:
    """What happened, for somebody who sees it for the first time."""
    tokens, trips = sum(len(chunk.ids) for chunk in chunks), len(chunks)
    seconds = sum(chunk.seconds for chunk in chunks)
    guessed = tokens - trips
    lines = [f"{tokens} tokens in {seconds:.1f} s, in {trips} trips through the {peers} peers."]
    if guessed > 0:
        lines.append(
            f"{guessed} of them were guessed on this machine, and only checked by the peers: that saves trips."
        )
    return "\n".join(lines)


def speed_line(chunks: list[OutputChunk]) -> str:
    """Tokens a second and, where traced, each hop's median time."""
    tokens = sum(len(chunk.ids) for chunk in chunks)
    decode_s = sum(chunk.seconds for chunk in chunks[1:])
    line = f"{tokens} tokens, first after {chunks[0].seconds * 1e3:.0f} ms"
    if decode_s:
        line += f", then {sum(len(chunk.ids) for chunk in chunks[1:]) / decode_s:.1f} tokens/s"
    return "\n".join([line, *draft_lines(chunks), *hop_lines(chunks)])


def draft_lines(chunks: list[OutputChunk]) -> list[str]:
    """Tokens a round, K, share of drafted nodes that were accepted; where the time went, if traced."""
    rounds = chunks[1:]
    nodes = sum(chunk.nodes for chunk in rounds)
    if not nodes:
        return []
    tokens = sum(len(chunk.ids) for chunk in rounds)
    line = (
        f"  drafts: {tokens / len(rounds):.2f} tokens a round, K {_median([chunk.nodes for chunk in rounds])}, "
        f"{(tokens - len(rounds)) / nodes:.0%} of {nodes} nodes accepted"
    )
    total = sum(chunk.seconds for chunk in rounds)
    draft = sum(chunk.draft_s for chunk in rounds)
    verify = sum(hop.end_ns - hop.start_ns for chunk in rounds for hop in chunk.hops) / 1e9
    if not verify:
        return [line]
    shares = {"draft": draft, "network": max(0.0, total - draft - verify), "verify": verify}
    return [line, "  time: " + ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in shares.items())]


def hop_lines(chunks: list[OutputChunk]) -> list[str]:
    """Median compute of each peer and median way between peers on one clock, in ms."""
    traces = [chunk.hops for chunk in chunks[1:] if chunk.hops]
    if not traces:
        return []
    lines = []
    for i, hop in enumerate(traces[0]):
        compute = _median([trace[i].end_ns - trace[i].start_ns for trace in traces])
        line = f"  peer {hop.peer_id[-8:]}: compute {compute / 1e6:.1f} ms"
        if i:
            ways = [trace[i].start_ns - trace[i - 1].end_ns - trace[i].queue_ns for trace in traces]
            line += f", hop from the peer before {_median(ways) / 1e6:.2f} ms"
        lines.append(line)
    return lines


def _median(values: list[int]) -> float:
    return sorted(values)[len(values) // 2]
