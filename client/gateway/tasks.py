"""Tasks that are not needed any more."""

from __future__ import annotations

import asyncio
from typing import Any

AGAIN_S = 0.05


async def end(task: asyncio.Future[Any]) -> None:
    """Cancel until it is over: before Python 3.12 `wait_for` may lose a cancellation that comes with its result."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=AGAIN_S)
    if not task.cancelled():
        task.exception()  # whoever needed it has it
