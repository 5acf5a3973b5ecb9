"""Malformed messages to every RPC, and malformed bytes to every parser of what comes from others."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import grpc
import numpy as np
from google.protobuf.message import Message
from petal.protocol import petal_pb2 as pb
from petal.protocol.checkpoint.gguf import GgufFile
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.safetensors import SafetensorsFile
from petal.protocol.directory.records import RecordError, parse_signed, verify_record
from petal.protocol.private.invites import InviteError, read_token
from petal.protocol.trust.identity import Identity
from petal.protocol.trust.tls_key import TlsKey, name_of, parse_certificate, self_signed
from petal.protocol.trust.trust import pinned, server_name
from petal.protocol.wire.codec import CodecError, decode

from tests.protocol.records_for_tests import signed_record
from tests.support.private_swarms import PrivateSwarm
from tests.support.tiny import tiny_llama
from tests.support.wire import Wire

from .hostile import altered
from .tally import Tally

# What gRPC makes of an exception that nobody expected; other statuses say what is wrong.
CRASHES = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL})
AT_ONCE = 24
SESSION, LINK = "/petal.v1.Peer/Session", "/petal.v1.Peer/Link"
# What may follow an open.
FRAMES = [
    pb.ClientFrame(step=pb.Step(step=1, route_epoch=1, ids=[1, 5, 9], prefill=True, sample=True)),
    pb.ClientFrame(
        step=pb.Step(
            step=1,
            route_epoch=1,
            ids=[1, 5, 9],
            parents=[-1, 0, 0],
            sample=True,
            want=pb.Want(top_logprobs=3, logits=True),
            sampling=pb.Sampling(temperature=0.8, top_k=5, top_p=0.9, repetition_penalty=1.1, seed=7),
            history=pb.History(ids=[1, 5], prompt_length=2),
        )
    ),
    pb.ClientFrame(link_to=pb.LinkTo(peer_id="Qm", token=b"t" * 16, route_epoch=2)),
    pb.ClientFrame(resume=pb.Resume(route_epoch=2, step=0, length=0, commit=[0], replayed=True, replay=True)),
]
# Two rows of 64 channels in float32.
ACTIVATIONS = pb.LinkFrame(
    activations=pb.Activations(
        step=1, route_epoch=1, rows=2, prefill=True, sample=True, hidden=b"\0" * 512, total_bytes=512
    )
)
PATIENCE_S = 20.0
Sender = Callable[[bytes], object]


class Fuzz:
    """Counts inputs and crashes until `inputs` are done or `seconds` are over."""

    def __init__(self, tally: Tally, inputs: int, seconds: float) -> None:
        self.tally = tally
        self.inputs: Counter[str] = Counter()
        self.crashes: list[str] = []
        self._wanted = inputs
        self._deadline = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() > self._deadline

    def parsers(self, folder: Path, share: float) -> None:
        """Bytes to what reads records, certificates, invitations, activations, checkpoints."""
        for name, part, sample, parse, errors in _parsers(folder):
            for _ in range(int(self._wanted * share * part)):
                data = self.tally.damaged(sample)
                self.inputs[name] += 1
                try:
                    parse(data)
                except errors:
                    continue
                except Exception as error:  # the very thing that is looked for
                    self.crashes.append(f"{name}: {type(error).__name__}: {error}")

    async def calls(self, wire: Wire, swarm: PrivateSwarm, share: float) -> None:
        """Messages to unary calls: of a public peer, and of an admin, to whom anybody may talk."""
        async with pinned(swarm.authority.address, swarm.admin.certificate, []) as admin:
            token = swarm.invite("client")
            redeem = pb.RedeemRequest(token=token, request=pb.CertificateRequest(csr=b"x" * 300))
            listing = pb.ListRequest(model="tiny", records=[signed_record(Identity.ephemeral())])
            methods: list[tuple[grpc.aio.Channel, str, Message]] = [
                (wire.channel, "/petal.v1.Directory/List", listing),
                (wire.channel, "/petal.v1.Directory/Ping", pb.PingReply(peer_id="abc")),  # a request has no fields
                (admin, "/petal.v1.Admin/Redeem", redeem),
                (admin, "/petal.v1.Admin/Renew", redeem.request),
            ]
            todo = iter(range(int(self._wanted * share)))
            await asyncio.gather(*(self._call(methods, todo) for _ in range(AT_ONCE)))

    async def _call(self, methods: list[tuple[grpc.aio.Channel, str, Message]], todo: Iterator[int]) -> None:
        for number in todo:
            if self.over:
                return
            channel, method, sample = methods[number % len(methods)]
            try:
                await channel.unary_unary(method)(self._malformed(sample), timeout=PATIENCE_S)
            except grpc.aio.AioRpcError as error:
                self._judge(method, error.code(), error.details())
            self.inputs[method] += 1

    async def streams(self, wire: Wire, tail: Wire, share: float) -> None:
        """Frames on streams that are new, opened or linked; `tail` is a peer that takes links."""
        todo = iter(range(int(self._wanted * share)))
        await asyncio.gather(*(self._streams(wire, tail, todo) for _ in range(AT_ONCE)))

    async def _streams(self, wire: Wire, tail: Wire, todo: Iterator[int]) -> None:
        for number in todo:
            if self.over:
                return
            if number % 3 == 0:
                await self._link(tail)
                continue
            opening = pb.ClientFrame(open=pb.Open(**wire.opening()))
            if number % 3 == 1:
                await self._stream(wire, SESSION, self._malformed(opening))
            else:
                frame = self._malformed(self.tally.random.choice(FRAMES))
                await self._stream(wire, SESSION, opening.SerializeToString(), frame)

    async def _link(self, tail: Wire) -> None:
        """Activations, or the hello before them, to a session that waits for them."""
        fields = tail.opening()
        session = tail.stream()
        try:
            token = (await session.open(**fields)).link_token
            await session.step(1, [7, 8], prefill=True, sample=True)
            hello = pb.LinkFrame(hello=tail.link_hello(fields["session_id"], token, 1))
            if self.tally.random.random() < 0.3:
                await self._stream(tail, LINK, self._malformed(hello))
            else:
                await self._stream(tail, LINK, hello.SerializeToString(), self._malformed(ACTIVATIONS))
        finally:
            session.close()
            tail.forget(session)

    async def _stream(self, wire: Wire, method: str, *frames: bytes) -> None:
        call = wire.channel.stream_stream(method)()
        try:
            for frame in frames:
                await call.write(frame)
            await call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # it has ended already
        self.inputs[method] += 1
        # A status comes once all answers are read; a read that begins as the call ends never returns in grpc.aio.
        reading = asyncio.ensure_future(_read_all(call))
        try:
            code = await asyncio.wait_for(call.code(), PATIENCE_S)
        except asyncio.TimeoutError:
            self.crashes.append(f"{method}: no answer")
            call.cancel()
        else:
            self._judge(method, code, await call.details())
        finally:
            reading.cancel()

    def _malformed(self, message: Message) -> bytes:
        """Every other time it still parses."""
        if self.tally.random.random() < 0.5:
            return self.tally.damaged(message.SerializeToString())
        return altered(self.tally.random, message).SerializeToString()

    def _judge(self, method: str, code: grpc.StatusCode, details: str | None) -> None:
        if code in CRASHES:
            self.crashes.append(f"{method}: {code.name}: {details}")


async def _read_all(call: grpc.aio.StreamStreamCall) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not grpc.aio.EOF:
            pass


def _parsers(folder: Path) -> Iterator[tuple[str, float, bytes, Sender, tuple[type[Exception], ...]]]:
    """Name, part of the inputs, a good sample, what reads it, and how it may refuse."""
    leaf = TlsKey.ephemeral()
    certificate = self_signed(leaf, name_of(leaf.public_key))
    record = signed_record(Identity.ephemeral()).SerializeToString()
    yield "record", 0.4, record, lambda data: verify_record(parse_signed(data)), (RecordError,)
    yield "certificate", 0.15, certificate, lambda data: server_name(parse_certificate(data)), (ValueError,)
    token = b"eyJhbGciOiJFUzI1NiJ9.eyJqdGkiOiJhIn0.AAAA"
    yield "invitation", 0.1, token, lambda data: read_token(data.decode("latin1")), (InviteError,)
    activations = np.ones((3, 64), np.float32).tobytes()
    yield "activations", 0.05, activations, lambda data: decode(pb.INT8, data, 64), (CodecError,)
    place = folder / "fuzzed"

    def on_disk(reader: Callable[[Path], object], rest: bytes) -> Sender:
        def read(data: bytes) -> None:
            place.write_bytes(data + rest)
            reader(place)

        return read

    header = _gguf_header(folder)
    yield "GGUF header", 0.15, header, on_disk(GgufFile, b"\0" * 4096), (CheckpointError,)
    whole = (tiny_llama() / "model.safetensors").read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    yield (
        "safetensors header",
        0.15,
        whole[:size],
        on_disk(SafetensorsFile, whole[size : size + 4096]),
        (CheckpointError,),
    )


def _gguf_header(folder: Path) -> bytes:
    path = folder / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()
