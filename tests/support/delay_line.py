"""A delay line for one direction of a TCP connection: what the emulator's proxies are made of."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import random
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

WINDOW_BYTES = 4 * 1024 * 1024  # in flight in one direction of one connection, as TCP would allow
LINGER_ZERO = struct.pack("ii", 1, 0)  # makes close send RST
MIN_SLICE_BYTES = 1500
WAKE_S = 0.0002  # from an alarm to bytes in the idle receiver that they wake, measured
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Conditions:
    """What the network is like, for both directions and all connections of a link."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    bits_per_s: float = 0.0  # each way, shared by all connections; 0: unlimited
    cut: bool = False
    stalled: bool = False


class Alarm:
    """Calls back at an exact time (a timerfd): the event loops round their own timers to milliseconds."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._fd = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        asyncio.get_running_loop().add_reader(self._fd, self._ring)

    def set(self, at: float) -> None:
        """Ring at this time.monotonic(), and not at the time set before."""
        seconds, nanoseconds = divmod(max(1, int(at * 1e9)), 10**9)
        _libc.timerfd_settime(self._fd, 1, struct.pack("qqqq", 0, 0, seconds, nanoseconds), None)

    def close(self) -> None:
        """Never ring again."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # set anew in the meantime
            os.read(self._fd, 8)
            self._callback()


class Lane:
    """One direction of a link: its line sends one byte at a time, whichever connection it is of."""

    def __init__(self) -> None:
        self.bytes = 0
        self._free_at = 0.0

    def slices(self, data: bytes, conditions: Conditions) -> list[tuple[float, bytes]]:
        """Cut what is sent now into pieces, each with the time at which it arrives."""
        self.bytes += len(data)
        rate = conditions.bits_per_s / 8
        size = max(MIN_SLICE_BYTES, int(rate / 1000)) if rate else len(data)
        return [
            (self._send(data[at : at + size], rate, conditions), data[at : at + size])
            for at in range(0, len(data), size)
        ]

    def _send(self, data: bytes, rate: float, conditions: Conditions) -> float:
        sent = max(time.monotonic(), self._free_at)
        if rate:
            sent = self._free_at = sent + len(data) / rate
        return sent + max(0.0, conditions.delay_s + random.uniform(-1, 1) * conditions.jitter_s)


FIN, RST = b"", None


class Pipe:
    """One direction of one connection: bytes are stamped when they come in and leave, in order, when they are due."""

    def __init__(self, conditions: Callable[[], Conditions], lane: Lane) -> None:
        self.source: asyncio.Transport | None = None
        self.sink: asyncio.Transport | None = None
        self.twin: Pipe | None = None  # the other direction
        self.finished = False
        self.dead = False  # it lost bytes, so nothing may follow
        self._conditions = conditions
        self._lane = lane
        self._line: deque[tuple[float, bytes | None]] = deque()
        self._in_flight = 0
        self._blocked = False
        self._alarm = Alarm(self.release)

    @property
    def gone(self) -> bool:
        """Whether nothing is left of it."""
        return self.dead and (self.sink is None or self.sink.is_closing())

    def take(self, data: bytes) -> None:
        """Bytes came in."""
        if self.dead:
            return
        for due, part in self._lane.slices(data, self._conditions()):
            self._append(due, part)
        self._in_flight += len(data)
        if self._in_flight > WINDOW_BYTES and self.source is not None:
            self.source.pause_reading()
        self.release()

    def end(self, how: bytes | None) -> None:
        """The sender has finished (FIN) or has gone (RST)."""
        if not self.dead:
            self._append(time.monotonic() + self._conditions().delay_s, how)
            self.release()

    def release(self) -> None:
        """Pass on what is due; the alarm rings for the next."""
        while self._line and self.sink is not None and not (self._blocked or self._conditions().stalled):
            due = self._line[0][0]
            if due - WAKE_S > time.monotonic():
                self._alarm.set(due - WAKE_S)
                return
            self._pass_on(self.sink, self._line.popleft()[1])

    def block(self, blocked: bool) -> None:
        """The receiver's socket is full, or has room again."""
        self._blocked = blocked
        self.release()

    def close(self) -> None:
        """Forget what is on its way."""
        self.dead = True
        self._line.clear()
        self._alarm.close()

    def _hang_up(self) -> None:
        for transport in (self.sink, self.source):
            if transport is not None:
                transport.close()

    def _append(self, due: float, data: bytes | None) -> None:
        self._line.append((max(due, self._line[-1][0]) if self._line else due, data))

    def _pass_on(self, sink: asyncio.Transport, data: bytes | None) -> None:
        if data is RST:
            reset(sink)
        elif data == FIN:
            self.finished = True
            with contextlib.suppress(OSError):  # the other side may be gone already
                sink.write_eof()
            if self.twin is not None and self.twin.finished:
                self._hang_up()
        else:
            self._in_flight -= len(data)
            sink.write(data)
            if self._in_flight <= WINDOW_BYTES and self.source is not None:
                self.source.resume_reading()


def reset(transport: asyncio.Transport) -> None:
    """Close a socket with RST."""
    if not transport.is_closing():
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_ZERO)
        transport.abort()
