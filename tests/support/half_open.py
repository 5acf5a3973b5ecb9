"""A caller that says a few bytes and no more."""

from __future__ import annotations

import asyncio
import ssl
import time

# The first bytes of a TLS record that promises 512 more; of an HTTP/2 connection; its first frame, with no settings.
HALF_A_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


async def until_closed(address: str, said: bytes, tls: bool, patience_s: float) -> float:
    """Seconds until a peer hangs up on somebody who says this and no more, or until patience is over."""
    host, port = address.split(":")
    context = None
    if tls:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    started = time.monotonic()

    async def listen() -> None:
        writer.write(said)
        while await reader.read(4096):
            pass  # what the peer says is read, and never answered

    try:
        await asyncio.wait_for(listen(), patience_s)
    except (ConnectionError, ssl.SSLError, asyncio.TimeoutError):
        pass
    finally:
        writer.transport.abort()
    return time.monotonic() - started


async def settings_of(address: str) -> dict[int, int]:
    """The HTTP/2 settings that a server tells first, by their numbers in RFC 9113."""
    host, _, port = address.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        writer.write(PREFACE + SETTINGS)
        head = await asyncio.wait_for(reader.readexactly(9), 10)
        assert head[3] == 4, "a server speaks of its settings first"
        body = await reader.readexactly(int.from_bytes(head[:3], "big"))
    finally:
        writer.close()
    return {
        int.from_bytes(body[at : at + 2], "big"): int.from_bytes(body[at + 2 : at + 6], "big")
        for at in range(0, len(body), 6)
    }
