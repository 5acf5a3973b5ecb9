"""Whatever a peer is sent: one sentence with the right status, that session ends, everyone else goes on."""

from __future__ import annotations

import asyncio
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import pytest_asyncio
from petal.client.routing.route import NoRoute
from petal.client.session.peer_error import PeerError
from petal.client.swarm import AsyncSwarmModel, ConnectError
from petal.peer.server import PeerServer
from petal.protocol import petal_pb2 as pb
from petal.protocol.trust.trust import PublicTrust
from petal.protocol.wire.codec import row_bytes
from petal.protocol.wire.limits import FRAME_BYTES, WINDOW_BYTES
from petal.protocol.wire.sampling import SamplingParams

from ..support.swarms import NO_RATES, LocalSwarm, local_swarm
from ..support.tiny import VOCAB, tiny_llama
from ..support.trees import token_chain
from ..support.wire import CALLER, CLIENT, RawSession, RawStream, Wire, settled

pytestmark = pytest.mark.asyncio(loop_scope="module")
Code = grpc.StatusCode
PROMPT = [1, 5, 9, 4, 77]
BESIDE = [1, 30, 31, 32, 33, 34]
HIDDEN = 64


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """One peer with the whole model, then two with half of it each; how often one may call is tested elsewhere."""
    spans = [range(0, 4), range(0, 2), range(2, 4)]
    async with local_swarm(tiny_llama(), spans, cache_tokens=4096, max_sessions=8, rates=NO_RATES) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(swarm: LocalSwarm) -> AsyncIterator[AsyncSwarmModel]:
    async with swarm.connect() as connected:
        yield connected


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def undisturbed(client: AsyncSwarmModel) -> list[int]:
    return await client.generate(BESIDE, max_new_tokens=8, eos_token_id=-1)


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def session_beside(client: AsyncSwarmModel, undisturbed: list[int]) -> AsyncIterator[None]:
    """Another session runs beside every test and must not notice."""
    said = list(BESIDE)
    async with await client.open_session(64) as session:
        said.append((await session.prefill(BESIDE, SamplingParams())).next_token)
        for token in range(7):
            if token == 3:
                yield
            said.append((await session.step(token_chain(said[-1:]))).next_token)
    assert said == undisturbed


@pytest_asyncio.fixture(loop_scope="module")
async def whole(swarm: LocalSwarm) -> AsyncIterator[Wire]:
    """The wire to the peer with the whole model, which must be as empty afterwards as before, but for our neighbour."""
    async with _tidy(swarm.peers[0]) as wire:
        yield wire


@pytest_asyncio.fixture(loop_scope="module")
async def head(swarm: LocalSwarm) -> AsyncIterator[Wire]:
    async with _tidy(swarm.peers[1]) as wire:
        yield wire


@pytest_asyncio.fixture(loop_scope="module")
async def tail(swarm: LocalSwarm) -> AsyncIterator[Wire]:
    async with _tidy(swarm.peers[2]) as wire:
        yield wire


class _tidy:
    def __init__(self, peer: PeerServer) -> None:
        self.wire = Wire(peer)
        self.before = peer.admission.sessions

    async def __aenter__(self) -> Wire:
        return self.wire

    async def __aexit__(self, *_: object) -> None:
        await self.wire.__aexit__()
        await until(lambda: self.wire.peer.admission.sessions == self.before)


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Only where there is no event to wait for."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


# Opening.


@pytest.mark.parametrize(
    ("changed", "code", "words"),
    [
        ({"model_digest": b"x" * 32}, Code.NOT_FOUND, ["not that model"]),
        ({"start": 0, "end": 5}, Code.NOT_FOUND, ["hosts blocks 0:4, not 0:5"]),
        ({"start": 2, "end": 2}, Code.NOT_FOUND, ["not 2:2"]),
        ({"protocol": 2}, Code.FAILED_PRECONDITION, ["protocol 2", "1 to 1"]),
        ({"protocol": 0}, Code.FAILED_PRECONDITION, ["protocol 0"]),
        ({"required_features": ["tree", "telepathy"]}, Code.UNIMPLEMENTED, ["'telepathy'"]),
        ({"adapter_id": "mine"}, Code.UNIMPLEMENTED, ["adapter_id"]),
        ({"block_prompts": b"p"}, Code.UNIMPLEMENTED, ["block_prompts"]),
        ({"session_id": b"short"}, Code.INVALID_ARGUMENT, ["16 bytes"]),
        ({"client_id": b""}, Code.INVALID_ARGUMENT, ["16 bytes"]),
        ({"codec": 0}, Code.INVALID_ARGUMENT, ["float32, bf16, int8"]),
        ({"codec": 9}, Code.INVALID_ARGUMENT, ["float32, bf16, int8"]),
        ({"reserve_tokens": 0}, Code.INVALID_ARGUMENT, ["reserve_tokens is 0"]),
        ({"reserve_tokens": 1 << 31}, Code.INVALID_ARGUMENT, ["the context is 512"]),
        ({"reserve_tokens": 4400}, Code.FAILED_PRECONDITION, ["never fit", "ask for fewer"]),
        ({"fork_of": b"f" * 16}, Code.NOT_FOUND, ["no session of yours"]),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else "",
)
async def test_bad_open_is_refused(whole: Wire, changed: dict[str, Any], code: Code, words: list[str]) -> None:
    session = whole.stream()
    await session.send(open=pb.Open(**whole.opening(**changed)))
    await session.refused(code, *words)


async def test_blocks_outside_the_span_are_refused(tail: Wire) -> None:
    session = tail.stream()
    await session.send(open=pb.Open(**tail.opening(start=1)))
    await session.refused(Code.NOT_FOUND, "hosts blocks 2:4, not 1:4")


async def test_taken_session_id_is_refused_and_the_first_owner_goes_on(whole: Wire) -> None:
    opening = whole.opening()
    first, second = whole.stream(), whole.stream()
    await first.open(**opening)
    await second.send(open=pb.Open(**opening))
    await second.refused(Code.ALREADY_EXISTS, "session id is taken")
    await first.step(1, PROMPT, prefill=True, sample=True)
    assert (await first.result()).sampled


async def test_fork_of_another_clients_session_is_as_unknown_as_none(whole: Wire) -> None:
    opening = whole.opening()
    await whole.stream().open(**opening)
    thief = whole.stream()
    await thief.send(open=pb.Open(**whole.opening(PublicTrust(), fork_of=opening["session_id"])))
    stolen = await thief.refused(Code.NOT_FOUND)
    guess = whole.stream()
    await guess.send(open=pb.Open(**whole.opening(fork_of=b"g" * 16)))
    assert await guess.refused(Code.NOT_FOUND) == stolen


async def test_fork_with_another_codec_is_refused(whole: Wire) -> None:
    opening = whole.opening()
    await whole.stream().open(**opening)
    fork = whole.stream()
    await fork.send(open=pb.Open(**whole.opening(fork_of=opening["session_id"], codec=pb.BF16)))
    await fork.refused(Code.INVALID_ARGUMENT, "codec and blocks")


async def test_first_frame_must_open(whole: Wire) -> None:
    session = whole.stream()
    await session.step(1, PROMPT)
    await session.refused(Code.INVALID_ARGUMENT, "starts with an open frame")


async def test_stream_that_ends_before_it_opens_is_refused(whole: Wire) -> None:
    session = whole.stream()
    await session.call.done_writing()
    await session.refused(Code.INVALID_ARGUMENT, "starts with an open frame")


@pytest.mark.parametrize("opened", [False, True], ids=["first frame", "after open"])
async def test_garbage_is_no_frame(whole: Wire, opened: bool) -> None:
    call = whole.channel.stream_stream(
        "/petal.v1.Peer/Session",
        request_serializer=lambda raw: raw,
        response_deserializer=pb.PeerFrame.FromString,
    )()
    session = RawStream(call, bytes)
    if opened:
        await call.write(pb.ClientFrame(open=pb.Open(**whole.opening())).SerializeToString())
        await session.read()
    await call.write(b"\xff\xfe garbage \x00\x01")
    await session.refused(Code.INVALID_ARGUMENT, "what arrived is not a message")


@pytest.mark.parametrize("frame", [{"open": pb.Open()}, {}], ids=["second open", "empty"])
async def test_only_known_frames_follow_the_open(whole: Wire, frame: dict[str, Any]) -> None:
    session, _ = await whole.session()
    await session.send(**frame)
    await session.refused(Code.INVALID_ARGUMENT, "resume, link_to and step")


# Steps.


@dataclass(frozen=True)
class Bad:
    """A step that is wrong after the good `before`, and what is said of it."""

    name: str
    words: tuple[str, ...]
    step: int = 2
    ids: tuple[int, ...] = (7,)
    fields: dict[str, Any] = field(default_factory=dict)
    code: Code = Code.INVALID_ARGUMENT


AT = {"base": len(PROMPT)}
BAD_STEPS = [
    Bad("id past the vocabulary", (f"token id {VOCAB}", f"vocabulary of {VOCAB}"), ids=(VOCAB,), fields=AT),
    Bad("huge id", ("past the vocabulary",), ids=(0xFFFFFFFF,), fields=AT),
    Bad("empty ids", ("0 rows",), ids=(), fields=AT),
    Bad("too many rows", ("3000 rows", "2048"), ids=(7,) * 3000, fields=AT),
    Bad("parent of itself", ("row 1 has parent 1",), ids=(7, 8), fields={**AT, "parents": [-1, 1]}),
    Bad("cycle", ("row 1 has parent 2",), ids=(7, 8, 9), fields={**AT, "parents": [-1, 2, 1]}),
    Bad("two roots", ("row 1 has parent -1",), ids=(7, 8), fields={**AT, "parents": [-1, -1]}),
    Bad("no root", ("row 0 has parent 0",), ids=(7, 8), fields={**AT, "parents": [0, 0]}),
    Bad("too few parents", ("2 rows but 1 parents",), ids=(7, 8), fields={**AT, "parents": [-1]}),
    Bad("prefill of a tree", ("chain",), ids=(7, 8, 9), fields={**AT, "parents": [-1, 0, 0], "prefill": True}),
    Bad("step 0", ("step 0 is stale", "step 2 comes next"), step=0, fields=AT),
    Bad("ahead", ("step 9 is ahead", "step 2 comes next"), step=9, fields=AT),
    Bad("altered repeat", ("repeated with other content",), step=1, ids=(7,), fields={"prefill": True, "sample": True}),
    Bad("commit after a prefill", ("nothing to commit",), fields={**AT, "commit": [0]}),
    Bad("rewind past the cache", ("rewind to 99", "5 rows"), fields={"rewind": 99, "base": 99}),
    Bad("base too high", ("base is 6, but 5 rows",), fields={"base": 6}),
    Bad("base of before a rewind", ("base is 5, but 3 rows",), fields={**AT, "rewind": 3}),
    Bad("unannounced route epoch", ("route epoch 2 was not announced",), fields={**AT, "route_epoch": 2}),
    Bad("backward", ("forward steps only",), fields={**AT, "op": pb.BACKWARD}),
    Bad("ids and embeddings", ("not both",), fields={**AT, "embeddings": b"\0" * 256}),
    Bad("half an embedding", ("128 bytes", "rows of 256"), ids=(), fields={**AT, "embeddings": b"\0" * 128}),
    Bad("embeddings of NaN", ("not finite",), ids=(), fields={**AT, "embeddings": b"\xff" * 256}),
    Bad("sampling without ids", ("token ids",), ids=(), fields={**AT, "embeddings": b"\0" * 256, "sample": True}),
    Bad("other embeddings in a repeat", ("other content",), step=1, ids=(), fields={"embeddings": b"\0" * 256}),
    Bad("too many logprobs", ("top_logprobs is 65", "64"), fields={**AT, "want": pb.Want(top_logprobs=65)}),
    Bad("short history", ("history of 2 ids", "5 cached rows"), fields={**AT, "history": pb.History(ids=[1, 2])}),
    Bad(
        "prompt longer than its history",
        ("does not fit",),
        fields={**AT, "history": pb.History(ids=PROMPT, prompt_length=6)},
    ),
    Bad("history of foreign ids", ("vocabulary",), fields={**AT, "history": pb.History(ids=[VOCAB] * 5)}),
    Bad(
        "past the reservation",
        ("133 rows exceed the 128",),
        ids=(7,) * 128,
        fields={**AT, "prefill": True},
        code=Code.RESOURCE_EXHAUSTED,
    ),
]


@pytest.mark.parametrize("bad", BAD_STEPS, ids=lambda bad: bad.name)
async def test_bad_step_ends_its_session(whole: Wire, bad: Bad) -> None:
    session, _ = await whole.prefilled(PROMPT)
    await session.step(bad.step, bad.ids, **bad.fields)
    await session.refused(bad.code, *bad.words)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"temperature": 1e-9}, "temperature is 0 or from 0.0001 to 100"),
        ({"temperature": 101}, "temperature is 0 or from 0.0001 to 100"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p is above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is above 0 and at most 1"),
        ({"min_p": -0.1}, "min_p is from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is from 0.01 to 100"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"presence_penalty": -101}, "presence_penalty is from -100 to 100"),
        ({"frequency_penalty": 1e9}, "frequency_penalty is from -100 to 100"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias names token 256, past the vocabulary"),
        ({"grammar_mask": b"m"}, "does not serve grammar_mask"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
async def test_bad_sampling_names_its_range(whole: Wire, sampling: dict[str, Any], words: str) -> None:
    session, _ = await whole.session()
    message = pb.Sampling(**{"top_p": 1.0, "repetition_penalty": 1.0, **sampling})
    await session.step(1, PROMPT, prefill=True, sample=True, sampling=message)
    await session.refused(Code.INVALID_ARGUMENT, words)


@pytest.mark.parametrize(
    ("commit", "words"),
    [
        ([], "starts with row 0"),
        ([1], "starts with row 0"),
        ([0, 2], "row 2 is not a child of row 0"),
        ([0, 1, 3], "row 3 is not a child of row 1"),
        ([0, 9], "row 9 is not a child"),
        ([0, 0], "row 0 is not a child"),
    ],
    ids=str,
)
async def test_commit_that_is_no_path_is_refused(whole: Wire, commit: list[int], words: str) -> None:
    session, token = await whole.prefilled(PROMPT)
    await session.step(2, [token, 8, 9, 10], parents=[-1, 0, 1, 0], sample=True, **AT)
    await session.result()
    await session.step(3, [7], base=len(PROMPT) + len(commit), commit=commit, sample=True)
    await session.refused(Code.INVALID_ARGUMENT, "bad commit", words)


async def test_second_tree_must_wait_for_the_first(whole: Wire) -> None:
    session, token = await whole.prefilled(PROMPT)
    gate = stall(whole.peer)
    await session.step(2, [token], sample=True, **AT)
    await session.step(3, [7], base=len(PROMPT) + 1, commit=[0], sample=True)
    try:
        await session.refused(Code.INVALID_ARGUMENT, "one tree is in flight")
    finally:
        gate.set()


async def test_step_past_the_context_is_refused(whole: Wire) -> None:
    session, _ = await whole.session(reserve_tokens=1024)
    await session.step(1, [7] * 513, prefill=True)
    await session.refused(Code.INVALID_ARGUMENT, "context ends at position 511")


async def test_step_of_an_old_route_epoch_is_dropped(whole: Wire) -> None:
    session, token = await whole.prefilled(PROMPT)
    await session.raise_epoch(3)
    await session.step(2, [99] * 3, base=77, commit=[5], route_epoch=1)
    await session.step(2, [token], sample=True, route_epoch=3, **AT)
    answer = await session.result()
    plain, _ = await whole.prefilled(PROMPT)
    await plain.step(2, [token], sample=True, **AT)
    assert (await plain.result()).next_token == answer.next_token
    await session.send(link_to=pb.LinkTo(peer_id="nobody", route_epoch=2))
    await session.refused(Code.INVALID_ARGUMENT, "route epoch 2 is older than 3")


async def test_steps_go_to_head_and_tail_only(whole: Wire) -> None:
    middle, _ = await whole.session(start=1, end=3)
    await middle.step(1, PROMPT, prefill=True)
    await middle.refused(Code.INVALID_ARGUMENT, "first and the last stage")
    tail, _ = await whole.session(start=1)
    await tail.step(1, embeddings=b"\0" * 256, prefill=True)
    await tail.refused(Code.INVALID_ARGUMENT, "embeddings go to the first stage alone")


async def test_a_tail_without_ids_returns_hidden_states_and_cannot_sample_later(whole: Wire) -> None:
    session, _ = await whole.session(codec=pb.INT8)
    size = row_bytes(pb.INT8, 64)
    await session.step(1, embeddings=b"\0" * 3 * size, prefill=True, want=pb.Want(hidden=True))
    assert len((await session.result()).hidden) == 3 * size
    await session.step(2, [7], base=3, sample=True)
    await session.refused(Code.INVALID_ARGUMENT, "0 of 3 cached ids are known here")


# Sizes.


async def test_oversized_frame_is_refused(whole: Wire) -> None:
    session, _ = await whole.session()
    await session.step(1, embeddings=b"\0" * FRAME_BYTES)
    await session.refused(Code.RESOURCE_EXHAUSTED, str(FRAME_BYTES))


async def test_more_than_the_window_is_refused(whole: Wire) -> None:
    session, opened = await whole.session()
    assert opened.window_bytes == WINDOW_BYTES
    padding = b"\0" * (FRAME_BYTES - 1024)
    for _ in range(WINDOW_BYTES // len(padding) + 1):
        await session.step(1, embeddings=padding, route_epoch=0)
    await session.refused(Code.RESOURCE_EXHAUSTED, "outstanding", str(WINDOW_BYTES))


async def test_full_peer_says_when_to_retry_and_has_room_again(whole: Wire) -> None:
    free = whole.peer.admission.free_tokens
    hog, _ = await whole.session(reserve_tokens=free - 16)
    late = whole.stream()
    await late.send(open=pb.Open(**whole.opening(reserve_tokens=32)))
    await late.refused(Code.RESOURCE_EXHAUSTED, "32 cache tokens asked, 16 of 4096 free", "retry in 2 s")
    hog.close()
    await until(lambda: whole.peer.admission.free_tokens == free)
    await whole.session(reserve_tokens=32)


async def test_too_many_sessions_say_when_to_retry(whole: Wire) -> None:
    for _ in range(8 - whole.peer.admission.sessions):
        await whole.session(reserve_tokens=16)
    late = whole.stream()
    await late.send(open=pb.Open(**whole.opening(reserve_tokens=16)))
    await late.refused(Code.RESOURCE_EXHAUSTED, "all 8 sessions are taken", "retry in")


async def test_waiting_client_gets_in_when_another_leaves(swarm: LocalSwarm, client: AsyncSwarmModel) -> None:
    async with Wire(swarm.peers[0]) as a, Wire(swarm.peers[1]) as b, Wire(swarm.peers[2]) as c:
        hogs = []
        for wire in (a, b, c):
            hogs.append((await wire.session(reserve_tokens=wire.peer.admission.free_tokens))[0])
        waiting = asyncio.create_task(client.open_session(64))
        with pytest.raises(PeerError, match="retry in 2 s"):
            await client.open_session(64, wait_s=0)
        assert not waiting.done()
        for hog in hogs:
            hog.close()
        (await asyncio.wait_for(waiting, 10)).close()


# Links.


async def linked(tail: Wire, **changed: Any) -> tuple[RawSession, RawStream]:
    """A session on the tail whose peer before is this test."""
    opening = tail.opening(**changed)
    session = tail.stream()
    opened = await session.open(**opening)
    link = tail.link()
    await link.send(hello=tail.link_hello(opening["session_id"], opened.link_token, 1))
    assert (await link.read()).linked.window_bytes == WINDOW_BYTES
    return session, link


def activations(**changed: Any) -> pb.Activations:
    hidden = b"\0" * (2 * row_bytes(pb.FLOAT32, HIDDEN))
    good = {"step": 1, "route_epoch": 1, "rows": 2, "prefill": True, "hidden": hidden, "total_bytes": len(hidden)}
    return pb.Activations(**{**good, **changed})


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (activations(hidden=b"\0" * 4, total_bytes=4), "2 rows are 512 bytes in this session's codec, 4"),
        (activations(total_bytes=1 << 40), "512 bytes in this session's codec"),
        (activations(hidden=b"\0" * 600), "600 bytes, 512 were announced"),
        (activations(rows=1 << 31, hidden=b"", total_bytes=0), "rows; from 1 to 2048"),
        (activations(parents=[-1, 5]), "row 1 has parent 5"),
        (activations(route_epoch=7), "route epoch 7 was not announced"),
    ],
    ids=["wrong size", "huge size", "more than announced", "rows", "parents", "epoch"],
)
async def test_bad_activations_end_the_session(tail: Wire, message: pb.Activations, words: str) -> None:
    session, link = await linked(tail)
    await link.send(activations=message)
    await link.refused(Code.INVALID_ARGUMENT, words)
    await session.refused(Code.INVALID_ARGUMENT, words)


def not_finite(codec: pb.Codec, value: float) -> bytes:
    bits = struct.pack("<f", value)
    return (bits[2:] if codec == pb.BF16 else bits).ljust(row_bytes(codec, HIDDEN), b"\0") * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("codec", ["FLOAT32", "BF16", "INT8"])
async def test_activations_that_are_not_finite_end_the_session(tail: Wire, codec: str, value: float) -> None:
    number = pb.Codec.Value(codec)
    session, link = await linked(tail, codec=number)
    rows = not_finite(number, value)
    await session.step(1, [7, 8], prefill=True, sample=True)
    await link.send(activations=activations(sample=True, hidden=rows, total_bytes=len(rows)))
    await session.refused(Code.INVALID_ARGUMENT, "not finite")


async def test_bad_chunk_with_more_behind_it_ends_only_its_session() -> None:
    async with local_swarm(tiny_llama(), [range(2, 4)]) as swarm, Wire(swarm.peers[0]) as wire:
        session, link = await linked(wire)
        gate = stall(wire.peer)
        for step, value in ((1, 0.0), (2, float("nan")), (3, 0.0)):
            rows = not_finite(pb.FLOAT32, value)
            await session.step(step, [7, 8], base=2 * step - 2, prefill=True)
            await link.send(activations=activations(step=step, base=2 * step - 2, hidden=rows))
        await until(lambda: wire.peer.engine._commands.qsize() >= 3)
        gate.set()
        await session.refused(Code.INVALID_ARGUMENT, "not finite")
        await settled(wire.peer)  # its compute thread is alive


async def test_client_and_link_must_agree(tail: Wire) -> None:
    session, link = await linked(tail)
    await session.step(1, [7, 8, 9], prefill=True)
    await link.send(activations=activations())
    await session.refused(Code.INVALID_ARGUMENT, "step 1 differs between the client's stream and the link")


async def test_steps_far_ahead_do_not_pile_up_at_the_tail(tail: Wire) -> None:
    session, _ = await linked(tail)
    await session.step(1, [7, 8], prefill=True)
    await session.step(5, [7, 8], prefill=True)
    await session.refused(Code.INVALID_ARGUMENT, "step 5 is ahead", "step 2 comes next")


async def test_head_takes_no_activations(head: Wire) -> None:
    session, link = await linked(head)
    await link.send(activations=activations())
    await session.refused(Code.INVALID_ARGUMENT, "first stage takes no activations")


@pytest.mark.parametrize("known", [True, False], ids=["wrong token", "unknown session"])
async def test_link_without_the_token_is_refused(tail: Wire, known: bool) -> None:
    opening = tail.opening()
    session = tail.stream()
    opened = await session.open(**opening)
    link = tail.link()
    hello = tail.link_hello(opening["session_id"], b"w" * 16, 1)
    if not known:
        hello = tail.link_hello(b"u" * 16, opened.link_token, 1)
    await link.send(hello=hello)
    await link.refused(Code.PERMISSION_DENIED, "token opens no session here")
    await session.raise_epoch(2)  # the session itself lives on


async def test_link_of_an_old_epoch_is_refused(tail: Wire) -> None:
    opening = tail.opening(route_epoch=4)
    opened = await tail.stream().open(**opening)
    link = tail.link()
    await link.send(hello=tail.link_hello(opening["session_id"], opened.link_token, 3))
    await link.refused(Code.FAILED_PRECONDITION, "route epoch 3 is over; 4 is current")


async def test_link_starts_with_a_hello(tail: Wire) -> None:
    link = tail.link()
    await link.send(activations=activations())
    await link.refused(Code.INVALID_ARGUMENT, "starts with a hello")


async def test_link_carries_only_activations(tail: Wire) -> None:
    session, link = await linked(tail)
    await link.send(hello=pb.LinkHello())
    await link.refused(Code.INVALID_ARGUMENT, "only activations follow")
    await session.refused(Code.INVALID_ARGUMENT, "only activations follow")


async def test_link_to_an_unknown_peer_is_a_fault_and_the_session_lives(head: Wire) -> None:
    session, _ = await head.session()
    await session.send(link_to=pb.LinkTo(peer_id="QmNobody", token=b"t" * 16, route_epoch=1))
    fault = (await session.read()).fault
    assert fault.peer_id == "QmNobody"
    assert "not in this peer's directory" in fault.reason
    await session.step(1, PROMPT, prefill=True)
    await session.send(link_to=pb.LinkTo(peer_id="QmNobody", token=b"t" * 16, route_epoch=1))
    assert (await session.read()).HasField("fault")


async def test_link_to_with_a_wrong_token_is_a_fault(head: Wire, tail: Wire) -> None:
    session, _ = await head.session()
    await session.send(link_to=pb.LinkTo(peer_id=tail.record.peer_id, token=b"t" * 16, route_epoch=1))
    fault = (await session.read()).fault
    assert "token opens no session here" in fault.reason


# Coming and going.


async def test_idle_session_expires() -> None:
    async with local_swarm(tiny_llama(), [range(0, 4)], idle_s=0.2) as swarm, Wire(swarm.peers[0]) as wire:
        session, _ = await wire.prefilled(PROMPT)
        await session.refused(Code.DEADLINE_EXCEEDED, "idle for 0.2 s")
        await until(lambda: not swarm.peers[0].admission.sessions)


async def test_client_that_vanishes_frees_its_pages(whole: Wire) -> None:
    peer = whole.peer
    await settled(peer)
    pages, sessions = peer.engine.cache.free_pages, peer.admission.sessions
    gone = Wire(peer)
    await gone.prefilled([7] * 64)
    session, _ = await gone.session()
    await session.step(1, [7] * 100, prefill=True)  # in flight while the connection breaks
    assert peer.engine.cache.free_pages < pages
    await gone.channel.close(grace=None)
    await until(lambda: peer.admission.sessions == sessions)
    await settled(peer)
    assert peer.engine.cache.free_pages == pages


async def test_older_client_without_optional_fields_still_works(whole: Wire) -> None:
    session = whole.stream()
    await session.send(
        open=pb.Open(
            session_id=b"o" * 16,
            client_id=CLIENT,
            hello=CALLER.hello(whole.record, b"o" * 16),
            protocol=1,
            model_digest=whole.record.model_digest,
            end=4,
            reserve_tokens=64,
            codec=pb.FLOAT32,
        )
    )
    assert (await session.read()).HasField("opened")
    await session.send(step=pb.Step(step=1, ids=PROMPT, prefill=True, sample=True))
    first = (await session.read()).result
    await session.send(step=pb.Step(step=2, base=len(PROMPT), ids=[first.next_token], sample=True))
    assert (await session.read()).result.accepted == [0]


async def test_fields_of_a_newer_client_are_ignored(whole: Wire) -> None:
    newer = pb.Open(**whole.opening())
    newer.MergeFromString(b"\xba\x3e\x03new")  # field 999, which this version does not know
    session = whole.stream()
    await session.send(open=newer)
    assert (await session.read()).HasField("opened")


# The real client.


async def test_client_refuses_prompts_that_cannot_fit(client: AsyncSwarmModel) -> None:
    for prompt in ([], [7] * 513, [7] * 6000):
        with pytest.raises(ValueError, match=r"empty|no room in 512 positions|no room"):
            await client.generate([prompt], max_new_tokens=4)


async def test_more_new_tokens_than_the_context_stop_at_its_end(client: AsyncSwarmModel) -> None:
    answer = await client.generate([7] * 500, max_new_tokens=100_000, eos_token_id=-1)
    assert len(answer) == 513


async def test_no_route_names_the_missing_blocks() -> None:
    async with local_swarm(tiny_llama(), [range(1, 2)]) as swarm:
        with pytest.raises(ConnectError, match="nobody hosts blocks 0 and 2-3"):
            await AsyncSwarmModel.connect(swarm.model, [swarm.address])


async def test_other_weights_under_the_same_name_are_refused(swarm: LocalSwarm) -> None:
    async with swarm.connect() as other:
        other.connection.known.digest = b"x" * 32
        with pytest.raises(ConnectError, match="other weights"):
            await other.route()


async def test_unknown_model_has_no_route(swarm: LocalSwarm) -> None:
    with pytest.raises((NoRoute, ConnectError), match="no peer serves"):
        await AsyncSwarmModel.connect(str(tiny_llama(seed=9)), [swarm.address])


def stall(peer: PeerServer) -> threading.Event:
    """Hold the compute thread until the event is set."""
    gate = threading.Event()
    peer.engine.call(lambda: gate.wait(10) and None)
    return gate
