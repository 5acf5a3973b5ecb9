"""What is loaded when it is first needed, and kept."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class LoadOnce(Generic[T]):
    """Loads each thing on a thread of its own, once. A load that failed is tried again when it is next asked for.

    No program waits at its end for a load that nobody needs any more, as it would for a thread of an executor.
    """

    def __init__(self) -> None:
        self._loads: dict[str, asyncio.Future[T]] = {}

    def start(self, name: str, load: Callable[[], T]) -> asyncio.Future[T]:
        """The load of `name`, under way, done or failed."""
        if name not in self._loads:
            self._loads[name] = _on_a_thread(load)
        return self._loads[name]

    def again(self, name: str, load: Callable[[], T]) -> asyncio.Future[T]:
        """The load of `name`, begun anew where it had failed."""
        future = self.start(name, load)
        if future.done() and future.exception():
            del self._loads[name]
        return self.start(name, load)

    async def get(self, name: str, load: Callable[[], T]) -> T:
        """Wait for it; who stops waiting does not stop the load. Raises what `load` raises."""
        return await asyncio.shield(self.again(name, load))


def _on_a_thread(load: Callable[[], T]) -> asyncio.Future[T]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # whoever asks hears of it

    def finish(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def work() -> None:
        result, error = None, None
        try:
            result = load()
        except Exception as failure:
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=work, name="petal-load", daemon=True).start()
    return future
