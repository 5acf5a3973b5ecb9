import asyncio
import resource
import statistics
import subprocess
import sys
import time
from contextlib import suppress

import grpc
import pytest

from .emulator import Link

CHUNK = b"x" * 65536


@pytest.fixture
async def echo():
    """The address of a server that sends everything back, and its open writers."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def dial(address: str):
    host, _, port = address.partition(":")
    return await asyncio.open_connection(host, int(port))


async def round_trips(address: str, count: int = 20) -> list[float]:
    reader, writer = await dial(address)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        writer.write(b"ping")
        await reader.readexactly(4)
        times.append(time.perf_counter() - start)
    writer.close()
    return times


async def silence(reader: asyncio.StreamReader, seconds: float) -> bool:
    try:
        await asyncio.wait_for(reader.read(1), seconds)
    except asyncio.TimeoutError:
        return True
    return False


@pytest.mark.parametrize("delay_s", [0.0, 0.0033, 0.0125])
async def test_a_round_trip_takes_twice_the_delay(echo, delay_s):
    bare = statistics.median(await round_trips(echo))
    async with Link(echo, delay_s=delay_s) as link:
        times = await round_trips(link.address)
        assert min(times) >= 2 * delay_s - 0.0005
        extra = statistics.median(times) - 2 * delay_s - bare
        print(f"delay {delay_s * 1e3:.1f} ms: {extra * 1e3:.2f} ms too long")
        assert extra < 0.002


async def test_the_line_is_pipelined(echo):
    """Ten messages, each sent before the answer to the last: one round trip and a bit, not ten."""
    async with Link(echo, delay_s=0.05) as link:
        reader, writer = await dial(link.address)
        start = time.perf_counter()
        for number in range(10):
            writer.write(bytes([number]))
            await asyncio.sleep(0.002)
        assert await reader.readexactly(10) == bytes(range(10))
        assert 0.1 <= time.perf_counter() - start < 0.15


async def test_jitter_keeps_the_order(echo):
    async with Link(echo, delay_s=0.005, jitter_s=0.005) as link:
        times = await round_trips(link.address)
        assert max(times) - min(times) > 0.002
        reader, writer = await dial(link.address)
        sent = b"".join(number.to_bytes(2, "big") for number in range(500))
        for at in range(0, len(sent), 20):
            writer.write(sent[at : at + 20])
            await asyncio.sleep(0)
        assert await reader.readexactly(len(sent)) == sent


async def upload_s(address: str, size: int) -> float:
    """How long `size` bytes take one way, and one byte back."""
    reader, writer = await dial(address)
    start = time.perf_counter()
    for _ in range(0, size, len(CHUNK)):
        writer.write(CHUNK)
        await writer.drain()
    writer.write_eof()
    await reader.readexactly(1)
    return time.perf_counter() - start


@pytest.fixture
async def sink():
    """The address of a server that answers one byte once it has read everything."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 20):
            pass
        writer.write(b"!")
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@pytest.mark.parametrize("mbit", [20, 100, 500])
async def test_bandwidth(sink, mbit):
    size = mbit * 125_000 // 2 // len(CHUNK) * len(CHUNK)  # half a second
    async with Link(sink, delay_s=0.01, bits_per_s=mbit * 1e6) as link:
        cpu = time.process_time()
        took = await upload_s(link.address, size) - 0.02
        print(f"{mbit} Mbit/s: measured {size * 8e-6 / took:.1f}, CPU {(time.process_time() - cpu) / took:.0%}")
        assert size * 8e-6 / took == pytest.approx(mbit, rel=0.1)


async def test_connections_share_the_bandwidth(sink):
    async with Link(sink, bits_per_s=40e6) as link:
        took = await asyncio.gather(*(upload_s(link.address, 1_000_000) for _ in range(2)))
        assert max(took) == pytest.approx(0.4, rel=0.15)


async def test_what_is_in_flight_is_bounded():
    async def never_read(reader, writer) -> None:
        await asyncio.sleep(60)

    server = await asyncio.start_server(never_read, "127.0.0.1", 0, limit=1024)
    async with Link(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", delay_s=0.001) as link:
        _, writer = await dial(link.address)
        sent = 0
        with suppress(asyncio.TimeoutError):
            while sent < 1 << 28:
                writer.write(CHUNK)
                sent += len(CHUNK)
                await asyncio.wait_for(writer.drain(), 0.5)
        assert sent < 1 << 26
    server.close()


async def test_set_is_for_open_connections_too(echo):
    async with Link(echo) as link:
        reader, writer = await dial(link.address)
        writer.write(b"a")
        await reader.readexactly(1)
        link.set(delay_s=0.05)
        start = time.perf_counter()
        writer.write(b"b")
        await reader.readexactly(1)
        assert time.perf_counter() - start >= 0.1


async def test_cut_is_silent_and_final(echo):
    async with Link(echo) as link:
        reader, writer = await dial(link.address)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        link.cut()
        writer.write(b"b")
        late_reader, late_writer = await dial(link.address)
        late_writer.write(b"c")
        assert await silence(reader, 0.1)
        assert await silence(late_reader, 0.1)
        link.resume()
        writer.write(b"d")
        assert await silence(reader, 0.1), "bytes were lost, so none may follow"
        assert len(await round_trips(link.address, 1)) == 1


async def test_stall_and_resume(echo):
    async with Link(echo) as link:
        reader, writer = await dial(link.address)
        link.stall()
        writer.write(b"abc")
        assert await silence(reader, 0.1)
        writer.write(b"def")
        link.resume()
        assert await asyncio.wait_for(reader.readexactly(6), 1) == b"abcdef"


async def test_reset(echo):
    async with Link(echo, delay_s=0.01) as link:
        reader, writer = await dial(link.address)
        writer.write(b"a")
        await reader.readexactly(1)
        link.reset()
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        assert len(await round_trips(link.address, 1)) == 1


async def test_the_end_of_a_stream_passes(echo):
    async with Link(echo, delay_s=0.01) as link:
        reader, writer = await dial(link.address)
        writer.write(b"last words")
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 1) == b"last words"
        await asyncio.sleep(0.05)
        assert all(pipe.gone for pipe in link._pipes), "both sockets are closed"


async def test_nobody_behind_the_link():
    async with Link("127.0.0.1:1") as link:
        reader, _ = await dial(link.address)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), 1)


async def test_it_ends_by_itself_and_leaks_nothing(echo):
    async with Link(echo, lifetime_s=0.2) as link:
        reader, _ = await dial(link.address)
        await asyncio.wait_for(link.ended(), 1)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
        with pytest.raises(ConnectionRefusedError):
            await dial(link.address)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    async with Link(echo) as link:
        for _ in range(30):
            await round_trips(link.address, 1)
        await asyncio.sleep(0.05)
        assert len(link._pipes) < 30 < limit


async def test_grpc_passes():
    server = grpc.aio.server()

    async def stream(requests, context):
        async for request in requests:
            yield request

    echo_method = grpc.stream_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Echo": echo_method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with Link(f"127.0.0.1:{port}", delay_s=0.01) as link, grpc.aio.insecure_channel(link.address) as channel:
        call = channel.stream_stream("/test.Echo/Echo")()
        times = []
        for size in [10] * 10 + [500_000]:
            start = time.perf_counter()
            await call.write(bytes(size))
            assert len(await call.read()) == size
            times.append(time.perf_counter() - start)
        assert 0.02 <= statistics.median(times) < 0.03
        link.reset()
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await call.read()
    await server.stop(None)


async def test_as_a_process(echo):
    command = [sys.executable, "-m", "tests.support.emulator", "--to", echo, "--delay-ms", "5", "--seconds", "4"]
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    address = (await process.stdout.readline()).decode().strip()
    times = await round_trips(address)
    print(f"own process, 5 ms: median {statistics.median(times) * 1e3:.2f} ms")
    assert 0.0095 <= statistics.median(times) < 0.015
    process.stdin.write(b"delay 20\nnonsense\n")
    await asyncio.sleep(0.05)
    assert statistics.median(await round_trips(address, 3)) >= 0.04
    reader, writer = await dial(address)
    process.stdin.write(b"stall\n")
    await asyncio.sleep(0.05)
    writer.write(b"a")
    assert await silence(reader, 0.1)
    process.stdin.write(b"resume\n")
    assert await asyncio.wait_for(reader.readexactly(1), 1) == b"a"
    process.stdin.write(b"reset\n")
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(1), 1)
    process.stdin.write(b"cut\n")
    process.stdin.close()
    await asyncio.sleep(0.05)
    reader, writer = await dial(address)
    writer.write(b"a")
    assert await silence(reader, 0.1)
    assert await asyncio.wait_for(process.wait(), 6) == 0
