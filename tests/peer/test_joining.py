"""A joiner takes what nobody serves first, computes as the swarm does, and keeps within the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from petal.kernels.backend import LayerSpec
from petal.kernels.cpu.isa import isas
from petal.kernels.registry import backend_for
from petal.peer.fellows import common_name
from petal.peer.joining import Joiner, ServeError, cache_tokens
from petal.peer.options import ServeOptions
from petal.peer.placement import Profile, fill_gaps, served_profiles
from petal.protocol import petal_pb2 as pb
from petal.protocol.checkpoint.open import open_checkpoint

from ..kernels.conftest import fresh_kernels
from ..support.tiny import tiny_llama


def peer(
    start: int, end: int, quantization: str = "none", dtype: str = "float32", speed: float = 10.0
) -> pb.PeerRecord:
    return pb.PeerRecord(
        start=start, end=end, throughput=speed, state=pb.ONLINE, quantization=quantization, dtype=dtype, n_blocks=4
    )


@pytest.mark.parametrize(
    ("records", "most", "span", "why"),
    [
        ([], 30, range(0, 30), "nobody serves any yet"),
        ([], 12, range(0, 12), "nobody serves any yet"),
        ([peer(0, 15)], 30, range(15, 30), "nobody serves them"),
        ([peer(0, 15)], 10, range(15, 25), "nobody serves them"),
        ([peer(5, 25)], 30, range(0, 30), "nobody serves them"),
        ([peer(5, 25)], 6, range(0, 5), "nobody serves them"),
        ([peer(0, 29)], 20, range(29, 30), "nobody serves them"),
        ([peer(0, 15), peer(15, 30, speed=1.0)], 10, range(15, 25), "by the slowest"),
        ([peer(0, 30)], 30, range(0, 30), "a spare helps"),
    ],
)
def test_what_is_missing_is_taken_first_and_nothing_else(
    records: list[pb.PeerRecord], most: int, span: range, why: str
) -> None:
    found, reason = fill_gaps(records, 30, most)
    assert found == span
    assert why in reason


def test_the_profile_that_lacks_least_is_served_first() -> None:
    records = [peer(0, 3), peer(0, 2, "gguf", "bf16", 99.0), peer(3, 4, "int8", "bf16")]
    assert served_profiles(records, 4)[0] == Profile("float32", "none")
    assert served_profiles([*records, peer(2, 4, "gguf", "bf16")], 4)[0] == Profile("bf16", "gguf")
    assert served_profiles([pb.PeerRecord(end=4, dtype="bf16", state=pb.LEFT)], 4) == []


def test_a_joiner_calls_weights_as_others_do() -> None:
    named = [pb.PeerRecord(model=name) for name in ("b", "a", "a")]
    assert [common_name(named, own) for own in ("b", "c")] == ["b", "a"]
    assert common_name([], "c") == "c"


def joiner(notes: list[str], **options: Any) -> Joiner:
    checkpoint = open_checkpoint(tiny_llama())
    settings = ServeOptions(model="tiny", **{"quant": None, **options})
    return Joiner(settings, checkpoint, backend_for("cpu"), 1 << 30, notes.append)


def test_a_joiner_computes_as_the_swarm_does() -> None:
    notes: list[str] = []
    alone = joiner(notes).precision([])
    assert (alone.quant, alone.dtype_name) == ("none", "float32")
    for dtype, quant in (("bf16", "int8"), ("bf16", "none"), ("bf16", "nf4")):
        taken = joiner(notes).precision([peer(0, 2, quant, dtype)])
        assert (taken.quant, taken.dtype_name) == (quant, dtype)
    assert notes == []


def test_who_cannot_or_will_not_fit_in_is_told() -> None:
    notes: list[str] = []
    taken = joiner(notes).precision([peer(0, 2, "gguf", "bf16"), peer(0, 1, "from the future", "fp2")])
    assert taken.quant == "none"
    assert f"serves {tiny_llama(0).name} in gguf (bf16), this peer in float32" in notes.pop()
    joiner(notes, quant="int4").precision([peer(0, 2)])
    assert "leave --quant and --dtype out" in notes.pop()


def exact(numerics: str, start: int = 0, end: int = 2) -> pb.PeerRecord:
    record = peer(start, end, dtype="bf16")
    record.numerics = numerics
    record.features.append("exact")
    return record


def in_step(notes: list[str], records: list[pb.PeerRecord], **options: Any) -> str:
    """What a joiner calls its bits, having heard of these peers."""
    joining = joiner(notes, **{"dtype": "bf16", "exact": True, **options})
    precision = joining.precision([])
    return precision.numerics(joining.in_step(precision, records).backend)


@pytest.mark.parametrize("arithmetic", sorted({isa.arithmetic for isa in isas()}))
def test_in_exact_mode_a_joiner_has_the_swarms_arithmetic(arithmetic: str) -> None:
    """Each that this processor has; without exact mode routes mix them."""
    notes: list[str] = []
    own, wanted = in_step(notes, []), f"bf16/{arithmetic}"
    assert in_step(notes, [exact(own, 0, 1), exact(wanted, 0, 3), exact("bf16/sm_90", 3, 4)]) == wanted
    assert notes == ([] if own == wanted else [f"computing as the swarm's peers in exact mode do, in {wanted}"])
    assert in_step(notes, [exact(wanted)], exact=False) == own
    plain, gone = exact(wanted), exact(wanted)
    del plain.features[:]
    gone.state = pb.LEFT
    assert in_step(notes, [plain, gone]) == own


def test_a_joiner_that_lacks_the_swarms_arithmetic_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    own = in_step(notes, [])
    assert in_step(notes, [exact("bf16/sm_90")]) == own
    assert notes.pop().startswith(f"the swarm's peers in exact mode compute in bf16/sm_90, this one in {own}, which no")
    other = next((isa for isa in isas() if f"bf16/{isa.arithmetic}" != own), None)
    if other:
        monkeypatch.setenv("PETAL_ISA", isas()[0].name)
        with fresh_kernels():
            assert in_step(notes, [exact(f"bf16/{other.arithmetic}")]) == own
        assert notes.pop().endswith("this machine cannot do as they do while PETAL_ISA is set")


def test_blocks_are_counted_in_the_joiners_own_profile() -> None:
    notes: list[str] = []
    fresh = joiner(notes)
    records = [peer(0, 2), peer(0, 1, "int8", "bf16"), peer(2, 4, "int8", "bf16")]
    precision = fresh.precision(records)
    assert precision.quant == "int8"
    assert fresh.blocks(precision, records) == range(1, 2)
    assert f"taking blocks 1:2 of {tiny_llama(0).name}: nobody serves them yet" in notes


def test_more_blocks_than_there_are_is_no_wish() -> None:
    greedy = joiner([], num_blocks=500)
    with pytest.raises(ServeError, match=f"--num-blocks 500 is more than the 4 blocks of {tiny_llama(0).name}$"):
        greedy.blocks(greedy.precision([]), [])


LAYERS = [LayerSpec(32, 128, 128, None)] * 32  # Llama-2-7B: a mebibyte a token


def test_the_cache_fits_beside_the_weights() -> None:
    notes: list[str] = []
    assert cache_tokens(None, LAYERS, torch.float32, 64 << 30, notes.append) == 16384
    assert cache_tokens(20000, LAYERS, torch.float32, 64 << 30, notes.append) == 20000
    assert notes == []
    shrunk = cache_tokens(None, LAYERS, torch.float32, 4 << 30, notes.append)
    assert 1000 < shrunk < 4096
    assert f"the cache holds {shrunk} tokens, not 16384" in notes[0]
    with pytest.raises(ServeError, match=r"--cache-tokens 1000000000 needs 976562\.5 GiB, and 4\.0 GiB"):
        cache_tokens(1_000_000_000, LAYERS, torch.float32, 4 << 30, notes.append)
    with pytest.raises(ServeError, match="only 153 tokens of cache fit"):
        cache_tokens(None, LAYERS, torch.float32, 256 << 20, notes.append)
