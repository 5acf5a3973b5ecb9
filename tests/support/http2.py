"""HTTP/2 by hand: frames that no client of gRPC would send (RFC 9113, RFC 7541)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl

from .half_open import PREFACE

DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
SESSION, PING_CALL = "/petal.v1.Peer/Session", "/petal.v1.Directory/Ping"


def frame(kind: int, flags: int = 0, stream: int = 0, body: bytes = b"") -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


def integer(value: int, bits: int, marks: int = 0) -> bytes:
    """An HPACK integer with a prefix of so many bits."""
    most = (1 << bits) - 1
    if value < most:
        return bytes([marks | value])
    said, value = bytearray([marks | most]), value - most
    while value >= 128:
        said.append(value % 128 | 128)
        value //= 128
    return bytes([*said, value])


def literal(name: str, value: str, indexed: bool = False) -> bytes:
    """A header in full; `indexed`: the other end is to keep it in its table."""
    said = (integer(len(part), 7) + part for part in (name.encode(), value.encode()))
    return bytes([0x40 if indexed else 0]) + b"".join(said)


def reference(index: int) -> bytes:
    """A header by its number in the table, where the newest of one's own is 62."""
    return integer(index, 7, 0x80)


def call(path: str) -> bytes:
    """The headers of a gRPC call: POST, https, and so on."""
    said = {":path": path, ":authority": "peer", "content-type": "application/grpc", "te": "trailers"}
    return b"\x83\x87" + b"".join(literal(name, value) for name, value in said.items())


class Http2:
    """One connection. What the other end says is read, and forgotten, unless `reads` is false."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reads: bool) -> None:
        self.writer = writer
        self.heard = 0
        self._streams = -1
        self._reading = asyncio.ensure_future(self._read(reader)) if reads else None
        if not reads:
            writer.transport.pause_reading()  # type: ignore[attr-defined]

    @classmethod
    async def dial(cls, address: str, reads: bool = True) -> Http2:
        host, _, port = address.rpartition(":")
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        connection = cls(reader, writer, reads)
        await connection.send(PREFACE + frame(SETTINGS))
        return connection

    @property
    def closed(self) -> bool:
        return self.writer.is_closing() or bool(self._reading and self._reading.done())

    def next_stream(self) -> int:
        self._streams += 2
        return self._streams

    async def send(self, *frames: bytes) -> None:
        """Raises ConnectionError where the other end has hung up."""
        self.writer.write(b"".join(frames))
        await self.writer.drain()

    async def flood(self, frames: bytes, seconds: float) -> int:
        """The same again and again, for so long or until the other end hangs up; returns the bytes sent."""
        sent = 0
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            async with asyncio.timeout(seconds):
                while not self.closed:
                    await self.send(frames)
                    sent += len(frames)
        return sent

    def close(self) -> None:
        if self._reading:
            self._reading.cancel()
        self.writer.transport.abort()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Answers settings and pings, so that the other end takes this for a client that is well."""
        with contextlib.suppress(ConnectionError, ssl.SSLError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(9)
                body = await reader.readexactly(int.from_bytes(head[:3], "big"))
                self.heard += len(head) + len(body)
                if head[3] in (SETTINGS, PING) and not head[4] & ACK:
                    self.writer.write(frame(head[3], ACK, 0, body if head[3] == PING else b""))
