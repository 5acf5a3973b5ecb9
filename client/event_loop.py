"""An event loop on a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from types import AsyncGeneratorType
from typing import Any, TypeVar

from ..protocol.errors import PetalError

T = TypeVar("T")


class ModelClosed(PetalError, RuntimeError):
    """The model was closed, or belongs to the process that this one was forked from."""


class EventLoopThread:
    """Runs coroutines for synchronous code. gRPC's asyncio objects live in the loop that made them: one for all."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="petal-client", daemon=True)
        self._thread.start()
        self._process = os.getpid()
        self._stopped = False
        # A thread that is gone answers nobody: streams that are still open end before the interpreter does.
        atexit.register(self.stop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for the result; an interrupt cancels the work. Raises ModelClosed once stopped, and after a fork."""
        future = self._submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def iterate(self, source: AsyncIterator[T]) -> Iterator[T]:
        """The items of an asynchronous iterator; closes it when the caller stops early."""
        try:
            while True:
                try:
                    yield self.run(_next(source))
                except StopAsyncIteration:
                    return
        finally:
            if self.runs:
                self.run(_close(source))

    async def delegate(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work of this loop from another one. Raises ModelClosed once stopped, and after a fork."""
        return await asyncio.wrap_future(self._submit(work))

    async def delegate_iteration(self, source: AsyncIterator[T]) -> AsyncIterator[T]:
        try:
            while True:
                try:
                    item = await self.delegate(_next(source))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if self.runs:
                await self.delegate(_close(source))

    def stop(self) -> None:
        """Cancel what still runs, and end the thread; nothing where it has ended."""
        atexit.unregister(self.stop)
        if not self.runs:
            return
        self.run(_cancel_others())
        self._stopped = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def runs(self) -> bool:
        """Whether it takes work: not once stopped, nor in a process that was forked."""
        return not self._stopped and os.getpid() == self._process

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self.runs:
            return asyncio.run_coroutine_threadsafe(work, self._loop)
        work.close()
        if self._stopped:
            raise ModelClosed("the model is closed: connect again")
        raise ModelClosed(
            "a process made by fork cannot use its parent's model: connect in each process, or start them by 'spawn'"
        )


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others)
    await asyncio.get_running_loop().shutdown_asyncgens()


async def _next(source: AsyncIterator[T]) -> T:
    return await anext(source)


async def _close(source: AsyncIterator[Any]) -> None:
    if isinstance(source, AsyncGeneratorType):
        while source.ag_running:  # noqa: ASYNC110 (an interrupted step is on its way out, and tells nobody)
            await asyncio.sleep(0)
        await source.aclose()
