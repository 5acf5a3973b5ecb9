"""Models from a hub: only what a span needs, resumed, cached within a limit, offline, and refusals in one sentence."""

from __future__ import annotations

import errno
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from petal.protocol.checkpoint.hub import HubFolder
from petal.protocol.checkpoint.hub_cache import HubCache
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.checkpoint.safetensors_model import SafetensorsCheckpoint

from .fake_hub import COMMIT, FakeHub, fake_hub
from .test_checkpoint import llama

SENTENCE = re.compile(r"[^\n]+[.:] [^\n]+\.?$|[^\n]+\.$")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    llama().save_pretrained(folder, max_shard_size="6KB")
    return folder


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    with fake_hub(model) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> HubCache:
    return HubCache(tmp_path / "cache")


def folder_of(hub: FakeHub, cache: HubCache, revision: str = "main", name: str = "org/tiny") -> HubFolder:
    return HubFolder(name, revision, cache, hub.url)


def shards_of(model: Path) -> dict[str, str]:
    return json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]


def test_only_the_shards_of_the_span_are_fetched(hub: FakeHub, cache: HubCache, model: Path, tmp_path: Path):
    checkpoint = SafetensorsCheckpoint(folder_of(hub, cache), tmp_path / "digests")
    names = checkpoint.block_tensors(1)
    assert sum(checkpoint.tensors[name].nbytes for name in names) > 0
    assert set(hub.fetched) == {"config.json", "model.safetensors.index.json"}, "headers were enough so far"
    checkpoint.files(names)
    shards = shards_of(model)
    wanted = {shards[name] for name in names}
    assert set(hub.fetched[2:]) == wanted
    local = open_checkpoint(model, tmp_path / "other")
    assert checkpoint.block_digests(1, 2) == local.block_digests(1, 2)
    for name in names:
        np.testing.assert_array_equal(checkpoint.read(name), local.read(name))
    assert len(hub.fetched) == 2 + len(wanted), "each file once"
    SafetensorsCheckpoint(folder_of(hub, cache), tmp_path / "digests").files(names)
    assert len(hub.fetched) == 2 + len(wanted), "the second time from the cache"


def test_a_broken_download_goes_on_where_it_stopped(hub: FakeHub, cache: HubCache, model: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    shard = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    folder_of(hub, cache).find("config.json")
    hub.budget = 2000
    with pytest.raises(CheckpointError, match="cannot be reached"):
        folder_of(hub, cache).find(shard.name)
    assert not cache.place("org/tiny", COMMIT, shard.name).exists(), "half a file is no file"
    hub.budget = None
    before = hub.bytes_sent
    path = folder_of(hub, cache).find(shard.name)
    assert path is not None
    assert path.read_bytes() == shard.read_bytes()
    assert 0 < hub.bytes_sent - before <= shard.stat().st_size - 1900, "only the rest was sent"


def test_a_cached_model_opens_offline_and_at_the_same_commit(
    hub: FakeHub, cache: HubCache, tmp_path: Path, model: Path
):
    names = SafetensorsCheckpoint(folder_of(hub, cache), tmp_path / "digests").block_tensors(0)
    SafetensorsCheckpoint(folder_of(hub, cache), tmp_path / "digests").files(names)
    gone = FakeHub(model, url="http://127.0.0.1:9")
    for revision in ("main", COMMIT):
        checkpoint = SafetensorsCheckpoint(folder_of(gone, cache, revision), tmp_path / "digests")
        checkpoint.files(names)
        with pytest.raises(CheckpointError, match="not cached and the hub cannot be reached"):
            checkpoint.files(checkpoint.tensors)


def test_no_network_is_said_at_once(model: Path, cache: HubCache):
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"config.json is not cached and the hub cannot be reached \(\w+\)"):
        folder_of(FakeHub(model, url="http://127.0.0.1:9"), cache).find("config.json")
    assert time.monotonic() - started < 3


def test_the_offline_switch_asks_nobody(hub: FakeHub, cache: HubCache, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="OfflineModeIsEnabled"):
        folder_of(hub, cache).find("config.json")
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("name", "revision", "file", "match"),
    [
        ("org/other", "main", "config.json", "org/other is not on the hub"),
        ("org/tiny", "v9", "config.json", "org/tiny is not on the hub, or not at this revision"),
        ("org/tiny", "main", "pytorch_model.bin", "is not fetched"),
        ("org/tiny", "main", "nothing.json", "has no nothing.json"),
    ],
)
def test_refusals_are_one_sentence(hub: FakeHub, cache: HubCache, name: str, revision: str, file: str, match: str):
    with pytest.raises(CheckpointError, match=match) as caught:
        folder_of(hub, cache, revision, name).find(file)
    assert SENTENCE.fullmatch(str(caught.value))
    assert list(cache.folder.rglob("*.safetensors*")) == []


def test_a_file_that_does_not_exist_is_remembered(hub: FakeHub, cache: HubCache, model: Path):
    folder = folder_of(hub, cache)
    folder.find("config.json")
    assert folder.find("chat_template.jinja") is None
    gone = folder_of(FakeHub(model, url="http://127.0.0.1:9"), cache)
    assert gone.find("chat_template.jinja") is None


@pytest.mark.parametrize("written", [0, 500])
def test_a_full_disk_leaves_nothing_behind(hub: FakeHub, cache: HubCache, monkeypatch, model: Path, written: int):
    folder = folder_of(hub, cache)
    folder.find("config.json")
    shard = sorted(model.glob("*.safetensors"))[0].name

    def full(url: str, stream, **options: object) -> None:
        stream.write(bytes(written))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
        folder.find(shard)
    assert not list(cache.folder.rglob(f"{shard}*"))


def test_a_disk_without_room_is_refused_before_the_download(hub: FakeHub, cache: HubCache, monkeypatch):
    folder = folder_of(hub, cache)
    monkeypatch.setattr("petal.protocol.checkpoint.hub_cache._MARGIN", 1 << 60)
    with pytest.raises(CheckpointError, match="make room on that disk"):
        folder.find("config.json")
    assert hub.fetched == []


def put(cache: HubCache, model: str, file: str, size: int, used: int) -> Path:
    path = cache.place(model, COMMIT, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, ns=(used, 1))
    return path


def test_the_least_recently_used_files_go_first(tmp_path: Path):
    cache = HubCache(tmp_path, limit=1000)
    old, older, fresh = (
        put(cache, "a/a", "1", 300, 20),
        put(cache, "b/b", "2", 300, 10),
        put(cache, "c/c", "3", 300, 30),
    )
    cache.make_room(cache.place("d/d", COMMIT, "4"), 100)
    assert all(path.exists() for path in (old, older, fresh))
    assert cache.find("b/b", COMMIT, "2") == older, "a use makes it young"
    assert older.stat().st_mtime_ns == 1, "digests are kept by the time of writing"
    cache.make_room(cache.place("d/d", COMMIT, "4"), 200)
    assert [path.exists() for path in (old, older, fresh)] == [False, True, True]
    cache.make_room(cache.place("d/d", COMMIT, "4"), 1000)
    assert not any(path.exists() for path in (old, older, fresh))
    with pytest.raises(CheckpointError, match="PETAL_CACHE_GB"):
        cache.make_room(cache.place("d/d", COMMIT, "4"), 1001)


def test_files_of_the_same_commit_are_not_evicted(tmp_path: Path):
    cache = HubCache(tmp_path, limit=1000)
    shard = put(cache, "a/a", "1", 600, 10)
    with pytest.raises(CheckpointError, match="raise PETAL_CACHE_GB"):
        cache.make_room(cache.place("a/a", COMMIT, "2"), 600)
    assert shard.exists()


def test_the_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PETAL_CACHE_GB", "1.5")
    assert HubCache.of_user().limit == 1_500_000_000
    monkeypatch.setenv("PETAL_CACHE_GB", "much")
    with pytest.raises(CheckpointError, match="a number of gigabytes"):
        HubCache.of_user()
