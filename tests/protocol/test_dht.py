import asyncio
import gc
import os
import time
from pathlib import Path

import pytest
from hivemind.dht.node import DHTNode
from petal.protocol import petal_pb2 as pb
from petal.protocol.directory.dht import DhtDirectory, OwnedRecords
from petal.protocol.directory.directory import DirectoryError
from petal.protocol.directory.publisher import Publisher
from petal.protocol.directory.records import sign_record, tombstone
from petal.protocol.trust.identity import Identity

from ..support.servers import silent_server
from .records_for_tests import good_record, signed_record

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
MODEL_KEY, INDEX_KEY = "petal 1 model tiny", "petal 1 models"
ALICE, BOB, EVE = Identity.ephemeral(), Identity.ephemeral(), Identity.ephemeral()


pytestmark = pytest.mark.waits


def ids(records):
    return {record.peer_id for record in records}


@pytest.fixture
async def join():
    """Creates nodes, each joining through the first one."""
    nodes: list[DhtDirectory] = []

    async def create(**options) -> DhtDirectory:
        peers = await nodes[0].multiaddrs() if nodes else ()
        nodes.append(await DhtDirectory.create(initial_peers=peers, **{"listen": [LOOPBACK], **options}))
        return nodes[-1]

    yield create
    await asyncio.gather(*(node.close() for node in nodes))


@pytest.fixture
async def intruder(join):
    """An honest node, and a raw node of the same DHT that checks nothing."""
    honest = await join()
    raw = await DHTNode.create(initial_peers=await honest.multiaddrs())
    yield honest, raw
    await raw.shutdown()


def words_of(pid: int) -> set[str]:
    """The command line of a process."""
    return set(Path(f"/proc/{pid}/cmdline").read_text().split("\0"))


async def store(raw: DHTNode, signed: pb.SignedRecord | bytes, **changes) -> bool:
    """What an honest node says to a store request for it."""
    record = signed if isinstance(signed, bytes) else signed.SerializeToString()
    expiry = pb.PeerRecord.FromString(signed.record).expires_at if isinstance(signed, pb.SignedRecord) else 9e9
    options = {"key": MODEL_KEY, "subkey": ALICE.peer_id, "expiration_time": expiry, "value": record, **changes}
    return await raw.store(**options, exclude_self=True)


async def test_publish_list_withdraw(join, tmp_path):
    path = tmp_path / "identity"
    identity = Identity.load_or_create(path)
    first, second, client = await join(identity_path=path), await join(), await join(client_mode=True)
    assert first.peer_id == identity.peer_id
    assert (await first.multiaddrs())[0].endswith(f"/p2p/{identity.peer_id}")

    record = good_record(identity, "tiny")
    await first.publish(sign_record(identity, record))
    await second.publish(signed_record(BOB, "other model"))
    for reader in first, second, client:
        assert ids(await reader.list("tiny")) == {identity.peer_id}
        assert ids(await reader.list("other model")) == {BOB.peer_id}
        assert ids(await reader.list()) == {identity.peer_id, BOB.peer_id}
        assert await reader.list("unknown") == []

    await first.withdraw(identity, record)
    for reader in first, second, client:
        assert await reader.list("tiny") == []
        assert ids(await reader.list()) == {BOB.peer_id}
    with pytest.raises(DirectoryError, match="did not take"):
        await second.publish(sign_record(identity, record))
    assert await client.list("tiny") == []


async def test_records_outlive_their_node_only_until_they_expire(join):
    first, second = await join(), await join()
    await second.publish(signed_record(ALICE))
    await second.close()
    assert ids(await first.list("tiny")) == {ALICE.peer_id}
    assert first.book.list("tiny", now=time.time() + 40) == []


async def test_a_daemon_that_died_is_started_again(join):
    first, second = await join(), await join()
    second._p2p._child.kill()
    await second._p2p._child.wait()
    await second.publish(signed_record(ALICE))
    assert ids(await first.list("tiny")) == {ALICE.peer_id}


async def test_closing_a_dead_node(join):
    node = await join()
    node._p2p._child.kill()
    await asyncio.wait_for(node.close(), 5)


async def test_forgeries_are_refused_by_the_nodes_that_store(intruder):
    honest, raw = intruder
    good = good_record(ALICE)
    signed = sign_record(ALICE, good)
    other_key = pb.SignedRecord(record=signed.record, public_key=EVE.public_key, signature=EVE.sign(signed.record))
    altered = pb.SignedRecord(
        record=signed.record[:-1] + b"\0", public_key=signed.public_key, signature=signed.signature
    )
    assert not await store(raw, other_key)
    assert not await store(raw, altered, expiration_time=good.expires_at)
    assert not await store(raw, signed, subkey=EVE.peer_id)
    assert not await store(raw, signed, subkey=ALICE.peer_id.encode())
    assert not await store(raw, signed, subkey=None)
    assert not await store(raw, signed, key="petal 1 model of another name")
    assert not await store(raw, signed, expiration_time=good.expires_at + 1)
    assert not await store(raw, signed, value=[signed.SerializeToString()])
    assert not await store(raw, signed, value=signed.SerializeToString().hex())
    assert not await store(raw, b"junk")
    assert not await store(raw, bytes(100_000))
    assert not await store(raw, signed_record(ALICE, end=7))
    assert not await store(raw, signed_record(ALICE, expires_at=time.time() + 700))
    assert await honest.list("tiny") == []
    assert await store(raw, signed), "the negative control"
    assert await store(raw, signed, key=INDEX_KEY)
    assert ids(await honest.list("tiny")) == {ALICE.peer_id}


async def test_a_node_that_stores_forgeries_is_not_believed(intruder):
    honest, raw = intruder
    await honest.publish(signed_record(ALICE))
    expiry = time.time() + 60
    forged = signed_record(BOB).SerializeToString()
    assert await raw.store(MODEL_KEY, forged, expiry, subkey=EVE.peer_id) is not None
    assert EVE.peer_id in (await raw.get(MODEL_KEY)).value
    assert ids(await honest.list("tiny")) == {ALICE.peer_id}
    raw.protocol.storage.clear()
    await raw.store(MODEL_KEY, b"one value in place of the dictionary", 9e9)
    assert ids(await honest.list("tiny")) == {ALICE.peer_id}


async def test_replay_of_an_older_version(intruder):
    honest, raw = intruder
    old, new = good_record(ALICE, version=1), good_record(ALICE, version=2)
    new.expires_at = old.expires_at + 1
    await honest.publish(sign_record(ALICE, old))
    await honest.publish(sign_record(ALICE, new))
    assert not await store(raw, sign_record(ALICE, old))
    assert [record.version for record in await honest.list("tiny")] == [2]
    sly = sign_record(ALICE, good_record(ALICE, version=1, expires_at=new.expires_at + 5))
    assert await store(raw, sly), "later expiry is all that the DHT asks"
    assert [record.version for record in await honest.list("tiny")] == [2], "but readers go by the version"


@pytest.mark.parametrize(("options", "expected"), [({}, "0"), ({"relay": True}, "1")])
async def test_libp2p_relaying_is_off_unless_asked_for(join, options, expected):
    node = await join(**options)
    assert {f"-relay={expected}", f"-autoRelay={expected}"} <= words_of(node._p2p._child.pid)


async def test_publisher(join):
    first, second = await join(), await join()
    state = pb.JOINING
    publisher = Publisher(first, ALICE, lambda: good_record(ALICE, state=state), period_s=0.2)
    await publisher.start()
    (joining,) = await second.list("tiny")
    state = pb.ONLINE
    await publisher.publish()
    (online,) = await second.list("tiny")
    assert (joining.state, online.state) == (pb.JOINING, pb.ONLINE)
    await asyncio.sleep(0.3)
    (later,) = await second.list("tiny")
    assert joining.version < online.version < later.version
    assert joining.expires_at < online.expires_at < later.expires_at
    await publisher.stop()
    assert await second.list("tiny") == []


async def test_publications_at_once(join):
    """The DHT takes no record that expires before the one it has: none may overtake another."""
    directory = await join()
    publisher = Publisher(directory, ALICE, lambda: good_record(ALICE))
    await asyncio.gather(*(publisher.publish() for _ in range(8)))
    assert ids(await directory.list()) == {ALICE.peer_id}


async def test_publisher_survives_failures(join, caplog):
    directory, failures = await join(), 2

    def describe() -> pb.PeerRecord:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError("no luck")
        return good_record(ALICE)

    publisher = Publisher(directory, ALICE, describe, period_s=0.05)
    await publisher.start()
    assert ids(await directory.list()) == {ALICE.peer_id}
    assert caplog.text == "", "the record before lives on: nobody misses anything"
    await publisher.stop()
    assert await directory.list() == []


async def test_a_publisher_that_nobody_hears_says_so_once(caplog):
    class Deaf:
        tries, enough = 0, asyncio.Event()

        async def publish(self, signed: pb.SignedRecord) -> None:
            self.tries += 1
            if self.tries == 30:
                self.enough.set()
            raise OSError("no luck")

    deaf = Deaf()
    publisher = Publisher(deaf, ALICE, lambda: good_record(ALICE), period_s=0.01, lifetime_s=0.1)
    starting = asyncio.create_task(publisher.start())
    await asyncio.wait_for(deaf.enough.wait(), 30)
    starting.cancel()
    assert publisher._task
    publisher._task.cancel()
    assert caplog.text.count("no luck") == 1
    assert "The swarm has not heard of this peer" in caplog.text


class SwallowingRegistry:
    """Takes the first record; afterwards a cancellation looks to it like a DHT that did not answer."""

    def __init__(self) -> None:
        self.taken, self.busy, self.withdrawn = 0, asyncio.Event(), False

    async def publish(self, signed: pb.SignedRecord) -> None:
        self.taken += 1
        if self.taken == 2:
            self.busy.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise DirectoryError("the DHT did not answer") from None

    async def withdraw(self, identity: Identity, record: pb.PeerRecord) -> None:
        self.withdrawn = True


async def test_publisher_stops_though_its_registry_swallows_the_cancellation():
    registry = SwallowingRegistry()
    publisher = Publisher(registry, ALICE, lambda: good_record(ALICE), period_s=0.02)
    await publisher.start()
    await registry.busy.wait()
    await asyncio.wait_for(publisher.stop(), 10)
    assert registry.withdrawn
    taken = registry.taken
    await asyncio.sleep(0.2)
    assert registry.taken == taken, "it publishes on behind its tombstone"


@pytest.mark.parametrize("kind", ["refused", "silent", "another peer"])
async def test_no_dht(kind, join):
    node = await join()
    (living,) = await node.multiaddrs()
    async with silent_server() as silent:
        transport = {
            "refused": "/ip4/127.0.0.1/tcp/1",
            "silent": f"/ip4/127.0.0.1/tcp/{silent.address.rpartition(':')[2]}",
            "another peer": living.rpartition("/p2p/")[0],
        }[kind]
        started = time.monotonic()
        with pytest.raises(DirectoryError, match=r"^None of the DHT's initial peers answers .*: check .*\.$"):
            await DhtDirectory.create(initial_peers=[f"{transport}/p2p/{EVE.peer_id}"], client_mode=True)
        assert time.monotonic() - started < 20
    gc.collect()  # what hivemind leaves behind complains once its loop is closed


@pytest.mark.parametrize("address", ["127.0.0.1:31330", "/ip4/127.0.0.1/tcp/1", "/ip4/127.0.0.1/tcp/1/p2p/!"])
async def test_what_is_no_multiaddr(address):
    with pytest.raises(DirectoryError, match="is no peer's multiaddr"):
        await DhtDirectory.create(initial_peers=[address])


async def test_a_swarm_whose_first_peer_comes_back(tmp_path):
    path = tmp_path / "identity"
    first = await DhtDirectory.create(path, listen=[LOOPBACK])
    (address,) = await first.multiaddrs()
    second = await DhtDirectory.create(initial_peers=[address], listen=[LOOPBACK])
    await second.publish(signed_record(BOB))
    await first.close()
    await second.list()  # finds the first peer gone
    with pytest.raises(DirectoryError, match="None of the DHT's initial peers answers"):
        await second.list()
    again = await DhtDirectory.create(path, listen=[address.rpartition("/p2p/")[0]], initial_peers=[address])
    for _ in range(20):
        await asyncio.sleep(0.5)  # the daemon waits a little before it dials a lost peer again
        try:
            await second.publish(signed_record(BOB, version=2, expires_at=time.time() + 40))
            break
        except DirectoryError:
            continue
    assert ids(await again.list("tiny")) == {BOB.peer_id}
    await second.close()
    await again.close()


async def test_tombstones_in_the_dht(intruder):
    honest, raw = intruder
    record = good_record(ALICE)
    await honest.publish(sign_record(ALICE, tombstone(record)))
    assert not await store(raw, sign_record(ALICE, record))
    assert await honest.list("tiny") == []


def test_the_validator_leaves_the_time_to_readers():
    """One expired entry must not make hivemind drop the whole dictionary."""
    from hivemind.dht.routing import DHTID
    from hivemind.dht.validation import DHTRecord
    from hivemind.utils.serializer import MSGPackSerializer as packed

    expiry = time.time() - 10
    value = packed.dumps(signed_record(ALICE, expires_at=expiry).SerializeToString())
    key = DHTID.generate(MODEL_KEY).to_bytes()
    assert OwnedRecords().validate(DHTRecord(key, packed.dumps(ALICE.peer_id), value, expiry))


async def test_an_interrupt_at_the_terminal_does_not_reach_the_daemon(join):
    """It would die before its peer could say that it leaves."""
    directory = await join()
    daemon = directory._p2p._child.pid
    assert os.getsid(daemon) == daemon != os.getsid(0)
