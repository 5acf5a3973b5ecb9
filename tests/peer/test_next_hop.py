"""A link writes in order, as far as its credit goes, and at once where nothing is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from petal.peer.session.next_hop import NextHop, begun
from petal.protocol import petal_pb2 as pb


class Call:
    """A stream as NextHop uses it: a write is through once `release` is called."""

    def __init__(self, window: int) -> None:
        self.written: list[pb.LinkFrame] = []
        self.replies: asyncio.Queue[Any] = asyncio.Queue()
        self.replies.put_nowait(pb.LinkReply(linked=pb.Linked(window_bytes=window)))
        self.broken = self.cancelled = False
        self._going = asyncio.Event()
        self._going.set()

    def stream_stream(self, *_: Any, **__: Any) -> Callable[[], Call]:
        return lambda: self

    def cancel(self) -> None:
        self.cancelled = True

    def hold(self) -> None:
        self._going.clear()

    def release(self) -> None:
        self._going.set()

    async def write(self, frame: pb.LinkFrame) -> None:
        if self.broken:
            raise asyncio.InvalidStateError
        self.written.append(frame)
        await self._going.wait()

    async def read(self) -> Any:
        return await self.replies.get()

    @property
    def steps(self) -> list[int]:
        """Those of the activations written."""
        return [frame.activations.step for frame in self.written if frame.HasField("activations")]


def frame(step: int, size: int = 100) -> pb.LinkFrame:
    return pb.LinkFrame(activations=pb.Activations(step=step, hidden=bytes(size)))


async def linked(call: Call, hop: NextHop | None = None) -> NextHop:
    hop = hop or NextHop(lambda *_: None)
    await hop.attach("next", call, pb.LinkHello())  # type: ignore[arg-type]
    return hop


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_frame_is_on_its_way_before_send_returns() -> None:
    hop = await linked(call := Call(1 << 20))
    call.hold()
    assert hop.send(frame(1)) == 0
    assert call.steps == [1]
    assert hop.send(frame(2)) > 0
    await settled()
    assert call.steps == [1], "one write at a time"
    call.release()
    await settled()
    assert call.steps == [1, 2]
    assert hop.send(frame(3)) == 0
    assert call.steps == [1, 2, 3]
    hop.close()


async def test_credit() -> None:
    hop = await linked(call := Call(250))
    sizes = [hop.send(frame(step)) for step in (1, 2, 3, 4)]
    await settled()
    assert call.steps == [1, 2]
    assert sizes[:2] == [0, 0]
    assert 0 < sizes[2] < sizes[3]
    call.replies.put_nowait(pb.LinkReply(credit=pb.Credit(bytes=120)))
    await settled()
    assert call.steps == [1, 2, 3]
    call.replies.put_nowait(pb.LinkReply(credit=pb.Credit(bytes=120)))
    await settled()
    assert call.steps == [1, 2, 3, 4]
    hop.close()


async def test_a_replay_goes_first_and_is_asked_as_credit_allows() -> None:
    hop, asked = NextHop(lambda *_: None), list[int]()

    def replay() -> Any:
        for step in range(10, 20):
            asked.append(step)
            yield frame(step)

    hop.send(frame(99))
    hop.restart(replay())
    assert hop.send(frame(1)) < 200, "what waited before is dropped"
    await linked(call := Call(250), hop)
    await settled()
    assert call.steps == [10, 11]
    assert len(asked) == 3
    call.replies.put_nowait(pb.LinkReply(credit=pb.Credit(bytes=1 << 20)))
    await settled()
    assert call.steps == [*range(10, 20), 1]
    hop.close()


async def test_what_a_broken_link_did_not_take_waits_for_the_next() -> None:
    hop = await linked(call := Call(1 << 20))
    call.broken = True
    hop.send(frame(1))
    await settled()
    assert hop.send(frame(2)) > 0
    assert hop.send(frame(3)) > 0
    await linked(second := Call(1 << 20), hop)
    await settled()
    assert call.steps == []
    assert second.steps == [2, 3]
    hop.close()
    assert second.cancelled


async def test_the_reader_reports_the_fault() -> None:
    faults: list[tuple[str, str]] = []
    hop = await linked(call := Call(1 << 20), NextHop(lambda *fault: faults.append(fault)))
    call.replies.put_nowait(grpc.aio.EOF)
    await settled()
    assert faults == [("next", "it closed the link")]
    hop.close()


@pytest.mark.parametrize("waits", [0, 1, 3])
async def test_work_that_has_begun(waits: int) -> None:
    said: list[int] = []

    async def work() -> None:
        said.append(0)
        for turn in range(waits):
            await asyncio.sleep(0.001)
            said.append(turn + 1)

    task = begun(work())
    assert said == [0]
    assert (task is None) == (waits == 0)
    if task:
        await task
    assert said == [*range(waits + 1)]


async def test_work_that_has_begun_can_be_cancelled() -> None:
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("ended")

    for turns in (0, 1):
        task = begun(work())
        assert task
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
    del task
    assert ended == ["ended", "ended"]
