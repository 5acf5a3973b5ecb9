"""What is loaded when it is first needed, and kept."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class LoadOnce(Generic[T]):
    """Loads each thing on a thread of its own, once. A load that failed is tried again when it is next asked for."""

    def __init__(self) -> None:
        self._loads: dict[str, asyncio.Task[T]] = {}

    def start(self, name: str, load: Callable[[], T]) -> asyncio.Task[T]:
        """The load of `name`, under way or done."""
        task = self._loads.get(name)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._loads[name] = asyncio.ensure_future(asyncio.to_thread(load))
        return task

    async def get(self, name: str, load: Callable[[], T]) -> T:
        """Wait for it; who stops waiting does not stop the load. Raises what `load` raises."""
        return await asyncio.shield(self.start(name, load))
