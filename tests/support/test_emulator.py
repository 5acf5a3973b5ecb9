import asyncio
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import grpc
import pytest

from .emulator import Link
from .servers import serving

CHUNK = b"x" * 65536
TRIES = 40


async def undisturbed(measure: Callable[[], Awaitable[float]], at_least: float, below: float) -> float:
    """What `measure` gives once other programs let it be.

    They can only make things late: nothing may ever come too early, and one time of several all must be on time.
    """
    for _ in range(TRIES):
        measured = await measure()
        assert measured >= at_least - 0.0005  # timers of the loop go by milliseconds
        if measured < below:
            return measured
    raise AssertionError(f"{measured} is never below {below}")


_open: list[asyncio.StreamWriter] = []


@pytest.fixture(autouse=True)
async def _hang_up():
    """No connection outlives its test."""
    yield
    for writer in _open:
        writer.transport.abort()
    for writer in _open:
        with suppress(ConnectionError):
            await writer.wait_closed()
    _open.clear()


@pytest.fixture
async def echo():
    """The address of a server that sends everything back."""

    async def send_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()

    async with serving(send_back) as server:
        yield server.address


async def dial(address: str):
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    _open.append(writer)
    return reader, writer


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
    async with Link(echo, delay_s=delay_s) as link:

        async def extra() -> float:
            bare = statistics.median(await round_trips(echo))
            times = await round_trips(link.address)
            assert min(times) >= 2 * delay_s - 0.0005
            return statistics.median(times) - 2 * delay_s - bare

        measured = await undisturbed(extra, at_least=-0.02, below=0.002)
        print(f"delay {delay_s * 1e3:.1f} ms: {measured * 1e3:.2f} ms too long")


async def test_the_line_is_pipelined(echo):
    """Ten messages, each sent before the answer to the last: one round trip and a bit, not ten."""
    async with Link(echo, delay_s=0.05) as link:
        reader, writer = await dial(link.address)

        async def ten() -> float:
            start = time.perf_counter()
            for number in range(10):
                writer.write(bytes([number]))
                await asyncio.sleep(0.002)
            assert await reader.readexactly(10) == bytes(range(10))
            return time.perf_counter() - start

        await undisturbed(ten, at_least=0.1, below=0.15)
        writer.close()


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

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(1 << 20):
            pass
        writer.write(b"!")

    async with serving(swallow) as server:
        yield server.address


@pytest.mark.parametrize("mbit", [20, 100, 500])
async def test_bandwidth(sink, mbit):
    size = mbit * 125_000 // 4 // len(CHUNK) * len(CHUNK)  # a quarter of a second
    ideal = size * 8e-6 / mbit
    async with Link(sink, delay_s=0.01, bits_per_s=mbit * 1e6) as link:
        took = await undisturbed(lambda: upload_s(link.address, size), 0.9 * ideal + 0.02, 1.1 * ideal + 0.02)
        print(f"{mbit} Mbit/s: measured {size * 8e-6 / (took - 0.02):.1f}")


async def test_connections_share_the_bandwidth(sink):
    async with Link(sink, bits_per_s=40e6) as link:

        async def both() -> float:
            return max(await asyncio.gather(*(upload_s(link.address, 1_000_000) for _ in range(2))))

        await undisturbed(both, at_least=0.34, below=0.46)


async def test_what_is_in_flight_is_bounded():
    async def never_read(reader, writer) -> None:
        await asyncio.sleep(60)

    async with serving(never_read, limit=1024) as server, Link(server.address, delay_s=0.001) as link:
        _, writer = await dial(link.address)
        sent = 0
        with suppress(asyncio.TimeoutError):
            while sent < 1 << 28:
                writer.write(CHUNK)
                sent += len(CHUNK)
                await asyncio.wait_for(writer.drain(), 0.5)
        assert sent < 1 << 26


async def test_set_is_for_open_connections_too(echo):
    async with Link(echo) as link:
        reader, writer = await dial(link.address)
        writer.write(b"a")
        await reader.readexactly(1)
        link.set(delay_s=0.05)
        start = time.perf_counter()
        writer.write(b"b")
        await reader.readexactly(1)
        assert time.perf_counter() - start >= 0.099  # timers of the loop go by milliseconds


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
        assert await asyncio.wait_for(reader.readexactly(6), 10) == b"abcdef"


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
        assert await asyncio.wait_for(reader.read(), 10) == b"last words"
        deadline = time.monotonic() + 10
        while not all(pipe.gone for pipe in link._pipes):  # both sockets are closed
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)


async def test_nobody_behind_the_link():
    async with Link("127.0.0.1:1") as link:
        reader, _ = await dial(link.address)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), 10)


async def test_it_ends_by_itself_and_leaks_nothing(echo):
    async with Link(echo, lifetime_s=0.2) as link:
        reader, _ = await dial(link.address)
        await asyncio.wait_for(link.ended(), 10)
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


@asynccontextmanager
async def started(server: grpc.aio.Server) -> AsyncIterator[None]:
    """Stopped whatever happens: one that runs on is an error in another test."""
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


async def test_grpc_passes():
    server = grpc.aio.server()

    async def stream(requests, context):
        async for request in requests:
            yield request

    echo_method = grpc.stream_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Echo", {"Echo": echo_method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    async with (
        started(server),
        Link(f"127.0.0.1:{port}", delay_s=0.01) as link,
        grpc.aio.insecure_channel(link.address) as channel,
    ):
        call = channel.stream_stream("/test.Echo/Echo")()

        async def there_and_back(size: int = 10) -> float:
            start = time.perf_counter()
            await call.write(bytes(size))
            assert len(await call.read()) == size
            return time.perf_counter() - start

        await there_and_back(500_000)
        await undisturbed(there_and_back, at_least=0.02, below=0.03)
        link.reset()
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await call.read()


async def emulator(*options: str) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "tests.support.emulator", *options]
    return await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def test_as_a_process(echo):
    process = await emulator("--to", echo, "--delay-ms", "5", "--seconds", "120")
    address = (await process.stdout.readline()).decode().strip()

    async def median() -> float:
        return statistics.median(await round_trips(address, 7))

    async def tell(command: bytes) -> None:
        """It has done so when it answers the question behind it."""
        process.stdin.write(command + b"\nbytes\n")
        assert int(await process.stdout.readline()) > 0

    print(f"own process, 5 ms: median {await undisturbed(median, 0.0095, 0.015) * 1e3:.2f} ms")
    await tell(b"delay 20\nnonsense")
    assert statistics.median(await round_trips(address, 3)) >= 0.0395
    reader, writer = await dial(address)
    await tell(b"stall")
    writer.write(b"a")
    assert await silence(reader, 0.1)
    await tell(b"resume")
    assert await asyncio.wait_for(reader.readexactly(1), 10) == b"a"
    await tell(b"reset")
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(1), 10)
    await tell(b"cut")
    reader, writer = await dial(address)
    writer.write(b"a")
    assert await silence(reader, 0.1)
    process.kill()
    await process.communicate()


async def test_a_process_ends_by_itself(echo):
    process = await emulator("--to", echo, "--seconds", "0.1")
    await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0
