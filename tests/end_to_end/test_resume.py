"""Going back and taking over, frame by frame; and everything of the kind that a peer refuses."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
from petal.protocol import petal_pb2 as pb
from petal.protocol.wire.codec import decode

from ..support.swarms import LocalSwarm, local_swarm
from ..support.tiny import tiny_llama
from ..support.wire import RawSession, RawStream, Wire, settled

pytestmark = pytest.mark.asyncio(loop_scope="module")
Code = grpc.StatusCode
PROMPT = [1, 5, 9, 4, 77, 30, 31, 32]
WIDTH = 64
ROW = 4 * WIDTH


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def swarm() -> AsyncIterator[LocalSwarm]:
    """The whole model, and its second half."""
    async with local_swarm(tiny_llama(), [range(0, 4), range(2, 4)]) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def whole(swarm: LocalSwarm) -> AsyncIterator[Wire]:
    async with Wire(swarm.peers[0]) as wire:
        yield wire
    await settled(swarm.peers[0])


@pytest_asyncio.fixture(loop_scope="module")
async def tail(swarm: LocalSwarm) -> AsyncIterator[Wire]:
    async with Wire(swarm.peers[1]) as wire:
        yield wire


def resume(step: int, length: int, **fields: Any) -> dict[str, pb.Resume]:
    return {"resume": pb.Resume(**{"route_epoch": 2, "step": step, "length": length, **fields})}


async def tree_step(session: RawSession, token: int, step: int = 2, **fields: Any) -> pb.Result:
    """A tree whose root is the token behind the prompt."""
    fields = {"base": len(PROMPT), "parents": [-1, 0, 0], "sample": True, **fields}
    await session.step(step, [token, 3, 4], **fields)
    return await session.result()


# Going back.


async def test_an_undone_step_gets_the_same_answer(whole: Wire) -> None:
    session, token = await whole.prefilled(PROMPT)
    answer = await tree_step(session, token)
    await session.send(**resume(1, len(PROMPT)))
    resumed = (await session.read()).resumed
    assert (resumed.route_epoch, len(resumed.link_token), resumed.log_lost) == (2, 16, False)
    again = await tree_step(session, token, route_epoch=2)
    assert (again.accepted, again.next_token) == (answer.accepted, answer.next_token)


async def test_a_resumption_commits_what_no_step_did(whole: Wire) -> None:
    session, token = await whole.prefilled(PROMPT)
    answer = await tree_step(session, token)
    kept = len(PROMPT) + len(answer.accepted)
    await session.send(**resume(2, kept, commit=answer.accepted))
    await session.read()
    await session.step(3, [answer.next_token], base=kept, sample=True, route_epoch=2)
    plain, _ = await whole.prefilled(PROMPT)
    await tree_step(plain, token)
    await plain.step(3, [answer.next_token], base=kept, commit=answer.accepted, sample=True)
    assert (await session.result()).next_token == (await plain.result()).next_token


async def test_a_step_under_way_is_dropped(whole: Wire) -> None:
    session, token = await whole.prefilled(PROMPT)
    gate = threading.Event()
    whole.peer.engine.call(lambda: gate.wait(10) and None)
    await session.step(2, [token] * 3, base=len(PROMPT), parents=[-1, 0, 0], sample=True)
    await session.send(**resume(1, len(PROMPT)))
    await session.raise_epoch(2)  # the peer has read the resumption
    gate.set()
    assert (await session.read()).HasField("resumed"), "no answer of the undone step may come"
    await session.step(2, [token], base=len(PROMPT), sample=True, route_epoch=2)
    assert (await session.result()).sampled


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        (resume(3, 8), Code.INVALID_ARGUMENT, "cannot resume behind step 3: step 2 is the newest"),
        (resume(2, 8, route_epoch=0), Code.INVALID_ARGUMENT, "route epoch 0 is older than 1"),
        (resume(2, 40, commit=[0]), Code.ABORTED, "cannot resume at 40 rows: 8 are cached"),
        (resume(2, 10, commit=[0, 7]), Code.ABORTED, "cannot resume at 10 rows"),
        (resume(2, 10, commit=[1, 0]), Code.ABORTED, "cannot resume at 10 rows"),
        (resume(2, 10, commit=[0, 0]), Code.ABORTED, "cannot resume at 10 rows"),
    ],
    ids=["future step", "old epoch", "too many rows", "no such row", "unordered", "twice"],
)
async def test_bad_resumptions_are_refused(
    whole: Wire, message: dict[str, pb.Resume], code: grpc.StatusCode, words: str
) -> None:
    session, token = await whole.prefilled(PROMPT)
    await tree_step(session, token)
    await session.send(**message)
    await session.refused(code, words)


async def test_steps_wait_for_the_resumed_frame(whole: Wire) -> None:
    session, token = await whole.prefilled(PROMPT)
    gate = threading.Event()
    whole.peer.engine.call(lambda: gate.wait(10) and None)
    await session.send(**resume(1, len(PROMPT)))
    await session.step(2, [token], base=len(PROMPT), sample=True, route_epoch=2)
    await session.refused(Code.INVALID_ARGUMENT, "steps wait for the resumed frame")
    gate.set()


# Taking over.


async def test_a_newcomer_with_the_tokens_replayed_answers_the_same(whole: Wire) -> None:
    session, token = await whole.prefilled(PROMPT)
    answer = await tree_step(session, token)
    newcomer, _ = await whole.session(resume=pb.Resume(step=1, length=len(PROMPT)))
    for start in (0, 5):
        ids = PROMPT[start : start + 5]
        await newcomer.step(1, ids, base=start, prefill=True, replay=True)
    history = pb.History(ids=PROMPT, prompt_length=len(PROMPT))
    again = await tree_step(newcomer, token, history=history)
    assert (again.accepted, again.next_token) == (answer.accepted, answer.next_token)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base": 1}, "rows 0 to 7 behind step 1 are missing"),
        ({"step": 2}, "rows 0 to 7 behind step 1 are missing"),
        ({"ids": [1] * 9}, "rows 0 to 7 behind step 1 are missing"),
        ({"prefill": False}, "replayed rows are a prefill that samples, commits and rewinds nothing"),
        ({"sample": True}, "replayed rows are a prefill"),
        ({"ids": [1 << 20]}, "past the vocabulary"),
    ],
    ids=["gap", "step", "too many", "no prefill", "sampled", "vocabulary"],
)
async def test_bad_replays_are_refused(whole: Wire, fields: dict[str, Any], words: str) -> None:
    newcomer, _ = await whole.session(resume=pb.Resume(step=1, length=len(PROMPT)))
    await newcomer.step(**{"step": 1, "ids": [7, 7], "prefill": True, "replay": True, **fields})
    await newcomer.refused(Code.INVALID_ARGUMENT, words)


async def test_nobody_replays_into_a_session_that_lacks_nothing(whole: Wire) -> None:
    session, _ = await whole.prefilled(PROMPT)
    await session.step(1, [7], base=0, prefill=True, replay=True)
    await session.refused(Code.INVALID_ARGUMENT, "a replay, but no row is missing")


async def test_a_step_before_the_end_of_the_replay_is_refused(whole: Wire) -> None:
    newcomer, _ = await whole.session(resume=pb.Resume(step=1, length=len(PROMPT)))
    await newcomer.step(2, [7], base=len(PROMPT), sample=True)
    await newcomer.refused(Code.INVALID_ARGUMENT, "before the 8 rows that are still to be replayed")


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"resume": pb.Resume(step=1, length=999)}, Code.RESOURCE_EXHAUSTED, "999 rows exceed the 128 that"),
        ({"resume": pb.Resume(step=1, length=3), "fork": True}, Code.INVALID_ARGUMENT, "forks or resumes, not both"),
    ],
    ids=["too long", "fork"],
)
async def test_bad_openings_are_refused(whole: Wire, fields: dict[str, Any], code: grpc.StatusCode, words: str) -> None:
    opening = whole.opening()
    await whole.stream().open(**opening)
    if fields.pop("fork", False):
        fields["fork_of"] = opening["session_id"]
    session = whole.stream()
    await session.send(open=pb.Open(**whole.opening(**fields)))
    await session.refused(code, words)


async def test_a_resumption_reserves_nothing(whole: Wire) -> None:
    """A client that reserved 16 rows once replayed 15,872, and the pool ran dry under others' feet."""
    session, token = await whole.prefilled(PROMPT, reserve_tokens=16)
    await tree_step(session, token)
    await session.send(**resume(1, 17, replayed=True))
    await session.refused(Code.RESOURCE_EXHAUSTED, "17 rows exceed the 16 that this session reserved")
    within, token = await whole.prefilled(PROMPT, reserve_tokens=16)
    await within.send(**resume(1, 16, replayed=True))
    assert (await within.read()).HasField("resumed")


async def test_nothing_forks_while_its_parent_goes_back(whole: Wire) -> None:
    """The fork would stand where its parent was, on pages of where its parent is."""
    session, token = await whole.prefilled(PROMPT, session_id=bytes(16))
    await tree_step(session, token)
    gate = threading.Event()
    whole.peer.engine.call(lambda: gate.wait(10) and None)
    await session.send(**resume(1, 4))
    await session.raise_epoch(3)  # the peer has read the resumption
    fork = whole.stream()
    await fork.send(open=pb.Open(**whole.opening(fork_of=bytes(16))))
    await fork.refused(Code.FAILED_PRECONDITION, "a session forks only between two steps")
    gate.set()


async def test_a_client_whose_stream_broke_opens_its_session_anew(whole: Wire) -> None:
    opening = whole.opening()
    old = whole.stream()
    await old.open(**opening)
    await old.step(1, PROMPT, prefill=True, sample=True)
    token = (await old.result()).next_token
    new = whole.stream()
    await new.open(**{**opening, "route_epoch": 2, "resume": pb.Resume(step=0, length=0)})
    await old.refused(Code.ABORTED, "opened anew on another stream")
    await new.step(1, PROMPT, prefill=True, sample=True, route_epoch=2)
    assert (await new.result()).next_token == token
    await settled(whole.peer)


@pytest.mark.parametrize("changed", [{"client_id": b"x" * 16, "route_epoch": 2}, {}], ids=["stranger", "same epoch"])
async def test_nobody_else_takes_a_session_over(whole: Wire, changed: dict[str, Any]) -> None:
    opening = whole.opening()
    mine = whole.stream()
    await mine.open(**opening)
    other = whole.stream()
    await other.send(open=pb.Open(**{**opening, **changed}))
    await other.refused(Code.ALREADY_EXISTS, "that session id is taken")
    await mine.step(1, PROMPT, prefill=True, sample=True)
    assert (await mine.result()).sampled


# Links.


async def linked(tail: Wire, **changed: Any) -> tuple[RawSession, RawStream, pb.Opened, bytes]:
    opening = tail.opening(**changed)
    session = tail.stream()
    opened = await session.open(**opening)
    link = tail.link()
    await link.send(hello=tail.link_hello(opening["session_id"], opened.link_token, opening["route_epoch"]))
    await link.read()
    return session, link, opened, opening["session_id"]


def replayed(rows: int, **changed: Any) -> pb.Activations:
    hidden = np.ones((rows, WIDTH), np.float32).tobytes()
    good = {"step": 1, "route_epoch": 1, "rows": rows, "prefill": True, "replay": True}
    return pb.Activations(**{**good, "hidden": hidden, "total_bytes": len(hidden), **changed})


async def test_activations_are_replayed_over_the_link(tail: Wire) -> None:
    session, link, _, _ = await linked(tail, resume=pb.Resume(step=1, length=5))
    await link.send(activations=replayed(2))
    await link.send(activations=replayed(3, base=2))
    fields = {"base": 5, "sample": True, "history": pb.History(ids=[7] * 5), "want": pb.Want(hidden=True)}
    hidden = np.ones((1, WIDTH), np.float32).tobytes()
    step = pb.Activations(step=2, route_epoch=1, base=5, rows=1, sample=True, hidden=hidden, total_bytes=len(hidden))
    step.want.hidden = True
    await session.step(2, [7], **fields)
    await link.send(activations=step)
    answer = decode(pb.FLOAT32, (await session.result()).hidden, WIDTH)
    plain, plain_link, _, _ = await linked(tail)
    await plain.step(1, [7] * 6, prefill=True, sample=True, want=pb.Want(hidden=True))
    six = np.ones((6, WIDTH), np.float32).tobytes()
    prompt = pb.Activations(step=1, route_epoch=1, rows=6, prefill=True, sample=True, hidden=six, total_bytes=len(six))
    prompt.want.hidden = True
    await plain_link.send(activations=prompt)
    expected = decode(pb.FLOAT32, (await plain.result()).hidden, WIDTH)
    assert np.array_equal(answer[-1], expected[-1])


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (replayed(6), "rows 0 to 4 behind step 1 are missing"),
        (replayed(2, hidden=b"\0" * ROW), "replayed rows come in frames of whole rows"),
        (replayed(2, route_epoch=9), "route epoch 9 was not announced"),
        (replayed(2, hidden=b"\xff" * 2 * ROW), "not finite"),
    ],
    ids=["too many", "half a frame", "epoch", "not finite"],
)
async def test_bad_replays_over_the_link_are_refused(tail: Wire, message: pb.Activations, words: str) -> None:
    session, link, _, _ = await linked(tail, resume=pb.Resume(step=1, length=5))
    await link.send(activations=message)
    await session.refused(Code.INVALID_ARGUMENT, words)


async def test_token_ids_are_not_replayed_to_a_tail(tail: Wire) -> None:
    session, _, _, _ = await linked(tail, resume=pb.Resume(step=1, length=5))
    await session.step(1, [7] * 5, prefill=True, replay=True)
    await session.refused(Code.INVALID_ARGUMENT, "a client replays to the first stage only")


async def test_after_a_resumption_the_former_link_and_its_token_are_void(tail: Wire) -> None:
    session, link, opened, session_id = await linked(tail)
    await session.send(**resume(0, 0))
    token = (await session.read()).resumed.link_token
    assert token != opened.link_token
    await link.send(activations=replayed(2, replay=False))
    await link.refused(Code.FAILED_PRECONDITION, "the route of this link is over")
    again = tail.link()
    await again.send(hello=tail.link_hello(session_id, opened.link_token, 2))
    await again.refused(Code.PERMISSION_DENIED, "token opens no session here")
    early = tail.link()
    await early.send(hello=tail.link_hello(session_id, token, 3))
    await early.refused(Code.FAILED_PRECONDITION, "route epoch 3 is not announced; 2 is current")
    good = tail.link()
    await good.send(hello=tail.link_hello(session_id, token, 2))
    assert (await good.read()).HasField("linked")
