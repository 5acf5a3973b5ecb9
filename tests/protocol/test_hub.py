"""Models from a hub: only what a span needs, resumed, cached within a limit, offline, and refusals in one sentence."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from petal.protocol.checkpoint.hub import HubCache, HubFolder
from petal.protocol.checkpoint.layout import CheckpointError
from petal.protocol.checkpoint.open import open_checkpoint
from petal.protocol.checkpoint.safetensors_model import SafetensorsCheckpoint
from safetensors.numpy import save_file

from .fake_hub import COMMIT, FakeHub, fake_hub

SENTENCE = re.compile(r"[^\n]+[.:] [^\n]+\.?$|[^\n]+\.$")
GONE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, each in a shard of its own, and one shard for what is shared."""
    folder = tmp_path_factory.mktemp("hub") / "tiny"
    folder.mkdir()
    shared = {"model.embed_tokens.weight": (32, 16), "model.norm.weight": (16,), "lm_head.weight": (32, 16)}
    block = {"self_attn.q_proj.weight": (16, 16), "mlp.up_proj.weight": (64, 16), "input_layernorm.weight": (16,)}
    shards = [shared, *({f"model.layers.{i}.{name}": shape for name, shape in block.items()} for i in range(3))]
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, shapes in enumerate(shards, 1):
        shard = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file({name: rng.random(shape, np.float32) for name, shape in shapes.items()}, folder / shard)
        weight_map |= dict.fromkeys(shapes, shard)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 3, "vocab_size": 32, "hidden_size": 16}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.fixture
def hub(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "library"))
    with fake_hub(model) as server:
        use(server.url, monkeypatch)
        yield server


def use(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT does where the library is first imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in ("constants", "file_download"):  # where 0.x and later versions look for it
        monkeypatch.setattr(f"huggingface_hub.{module}.HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def cache(tmp_path: Path) -> HubCache:
    folder = tmp_path / "cache"
    folder.mkdir()
    return HubCache(folder)


def folder_of(cache: HubCache, revision: str = "main", name: str = "org/tiny") -> HubFolder:
    return HubFolder(name, revision, cache)


def shards_of(model: Path) -> dict[str, str]:
    return json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]


def test_only_the_shards_of_the_span_are_fetched(hub: FakeHub, cache: HubCache, model: Path, tmp_path: Path):
    checkpoint = SafetensorsCheckpoint(folder_of(cache), tmp_path / "digests")
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
    SafetensorsCheckpoint(folder_of(cache), tmp_path / "digests").files(names)
    assert len(hub.fetched) == 2 + len(wanted), "the second time from the cache"


def test_a_broken_download_goes_on_where_it_stopped(hub: FakeHub, cache: HubCache, model: Path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100)
    shard = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    folder_of(cache).find("config.json")
    hub.budget = 2000
    with pytest.raises(CheckpointError, match="cannot be reached"):
        folder_of(cache, COMMIT).find(shard.name)
    assert cache.find("org/tiny", shard.name, COMMIT) is None, "half a file is no file"
    hub.budget = None
    before = hub.bytes_sent
    path = folder_of(cache, COMMIT).find(shard.name)
    assert path is not None
    assert path.read_bytes() == shard.read_bytes()
    assert 0 < hub.bytes_sent - before <= shard.stat().st_size - 1900, "only the rest was sent"
    assert not list(cache.folder.rglob("*.incomplete"))


def test_a_file_that_two_want_at_once_is_fetched_once(hub: FakeHub, cache: HubCache, model: Path):
    folder_of(cache).find("config.json")
    shard = sorted(model.glob("*.safetensors"))[0]
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: folder_of(cache, COMMIT).find(shard.name), range(4)))
    assert [path and path.read_bytes() for path in paths] == [shard.read_bytes()] * 4
    assert hub.fetched.count(shard.name) == 1


def test_a_cached_model_opens_offline_and_at_the_same_commit(
    hub: FakeHub, cache: HubCache, tmp_path: Path, monkeypatch
):
    names = SafetensorsCheckpoint(folder_of(cache), tmp_path / "digests").block_tensors(0)
    SafetensorsCheckpoint(folder_of(cache), tmp_path / "digests").files(names)
    use(GONE, monkeypatch)
    for revision in ("main", COMMIT):
        checkpoint = SafetensorsCheckpoint(folder_of(cache, revision), tmp_path / "digests")
        checkpoint.files(names)
        with pytest.raises(CheckpointError, match="not cached and the hub cannot be reached"):
            checkpoint.files(checkpoint.tensors)


def test_what_the_library_has_cached_is_not_fetched_again(hub: FakeHub, cache: HubCache, model: Path):
    from huggingface_hub import hf_hub_download

    shard = sorted(model.glob("*.safetensors"))[0].name
    theirs = hf_hub_download("org/tiny", shard)
    assert folder_of(cache, COMMIT).find(shard) == Path(theirs)
    assert hub.fetched == [shard]


def test_no_network_is_said_at_once(hub: FakeHub, cache: HubCache, monkeypatch: pytest.MonkeyPatch):
    use(GONE, monkeypatch)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"config.json is not cached and the hub cannot be reached \(\w+\)"):
        folder_of(cache).find("config.json")
    assert time.monotonic() - started < 3


def light_client(hub: FakeHub, home: Path, offline: str) -> subprocess.CompletedProcess[str]:
    """Open org/tiny in a process of its own, which takes its settings from the environment; it prints what it found."""
    script = (
        "import sys; from petal.protocol.checkpoint.open import open_checkpoint; model = open_checkpoint('org/tiny');"
        "model.files(model.layout.norm); print(model.tensors['model.norm.weight'].shape, 'torch' in sys.modules)"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": offline, "HOME": str(home), "XDG_CACHE_HOME": str(home)}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, check=False)


def test_the_offline_switch_asks_nobody(hub: FakeHub, tmp_path: Path):
    done = light_client(hub, tmp_path, offline="1")
    assert "config.json is not cached and the hub cannot be reached (OfflineModeIsEnabled)" in done.stderr
    assert hub.requests == []


def test_a_light_client_fetches_without_torch_and_then_works_offline(hub: FakeHub, tmp_path: Path):
    online = light_client(hub, tmp_path, offline="0")
    assert online.stdout == "(16,) False\n", online.stderr
    asked = len(hub.requests)
    assert asked > 0
    assert light_client(hub, tmp_path, offline="1").stdout == "(16,) False\n"
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("name", "revision", "file", "match"),
    [
        ("org/other", "main", "config.json", "org/other is not on the hub"),
        ("org/gated", "main", "config.json", "org/gated is gated: accept its terms"),
        ("org/tiny", "v9", "config.json", "org/tiny is not on the hub, or not at this revision"),
        ("org/tiny", "main", "pytorch_model.bin", "is not fetched"),
        ("org/tiny", "main", "modeling_tiny.py", "is not fetched"),
        ("org/tiny", "main", "../config.json", "is not fetched"),
        ("org/tiny", "main", "/etc/config.json", "is not fetched"),
        ("org/tiny", "main", "nothing.json", "has no nothing.json"),
    ],
)
def test_refusals_are_one_sentence(hub: FakeHub, cache: HubCache, name: str, revision: str, file: str, match: str):
    with pytest.raises(CheckpointError, match=match) as caught:
        folder_of(cache, revision, name).find(file)
    assert SENTENCE.fullmatch(str(caught.value))
    assert hub.fetched == []


@pytest.mark.parametrize("revision", ["..", "../main", "a/../b", "/etc", "a//b", ".git", "a\\b", "a b", ""])
def test_a_revision_leads_out_of_no_folder(hub: FakeHub, revision: str):
    with pytest.raises(CheckpointError, match="no hub id"):
        open_checkpoint(f"org/tiny@{revision}")
    assert hub.requests == []


@pytest.mark.parametrize("etag", ['"../../../../outside"', '"a/b"', '""', '".."'])
def test_an_etag_leads_out_of_no_folder(hub: FakeHub, cache: HubCache, etag: str):
    hub.etag = etag
    with pytest.raises(CheckpointError, match="does not answer as a hub does") as caught:
        folder_of(cache).find("config.json")
    assert SENTENCE.fullmatch(str(caught.value))
    assert list(cache.folder.iterdir()) == []


def test_a_file_that_does_not_exist_is_remembered(hub: FakeHub, cache: HubCache, monkeypatch: pytest.MonkeyPatch):
    folder = folder_of(cache)
    folder.find("config.json")
    assert folder.find("chat_template.jinja") is None
    use(GONE, monkeypatch)
    gone = folder_of(cache)
    assert gone.find("chat_template.jinja") is None
    with pytest.raises(CheckpointError, match="cannot be reached"):
        gone.find("tokenizer.json")


@pytest.mark.parametrize("written", [0, 500])
def test_a_full_disk_leaves_nothing_behind(hub: FakeHub, cache: HubCache, monkeypatch, model: Path, written: int):
    folder = folder_of(cache)
    folder.find("config.json")
    shard = sorted(model.glob("*.safetensors"))[0].name
    before = sorted(cache.folder.rglob("blobs/*"))

    def full(url: str, stream, **options: object) -> None:
        stream.write(bytes(written))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*make room"):
        folder.find(shard)
    assert sorted(cache.folder.rglob("blobs/*")) == before
    assert not list(cache.folder.rglob(shard))


def test_a_disk_without_room_is_refused_before_the_download(hub: FakeHub, cache: HubCache, monkeypatch):
    monkeypatch.setattr("petal.protocol.checkpoint.hub._MARGIN", 1 << 60)
    with pytest.raises(CheckpointError, match="make room on that disk"):
        folder_of(cache).find("config.json")
    assert hub.fetched == []


def put(cache: HubCache, letter: str, size: int, used: int, file: str = "weights.safetensors") -> Path:
    """Cache a file of the model `letter`/m, last used at `used`, as the library does."""
    blob = cache.blob(f"{letter}/m", f"{letter}-{file[0]}")
    snapshot = blob.parents[1] / "snapshots" / (letter * 40) / file
    for path in (blob, snapshot):
        path.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(bytes(size))
    os.utime(blob, ns=(used, 1))
    snapshot.symlink_to(blob)
    return snapshot


def test_the_least_recently_used_models_go_first(tmp_path: Path):
    cache = HubCache(tmp_path, limit=1000)
    old, older, fresh = put(cache, "a", 300, 2 * 10**9), put(cache, "b", 300, 10**9), put(cache, "c", 300, 3 * 10**9)
    coming = cache.blob("d/m", "d")
    cache.make_room("weights.safetensors", coming, 100, "d" * 40)
    assert all(path.exists() for path in (old, older, fresh))
    assert cache.find("b/m", older.name, "b" * 40) == older, "a use makes it young"
    assert older.stat().st_mtime_ns == 1, "digests are kept by the time of writing"
    cache.make_room("weights.safetensors", coming, 200, "d" * 40)
    assert [path.exists() for path in (old, older, fresh)] == [False, True, True]
    with pytest.raises(CheckpointError, match="PETAL_CACHE_GB"):
        cache.make_room("weights.safetensors", coming, 1001, "d" * 40)
    assert [path.exists() for path in (old, older, fresh)] == [False, True, True], "it would have been in vain"
    cache.make_room("weights.safetensors", coming, 1000, "d" * 40)
    assert not any(path.exists() for path in (old, older, fresh))
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) == 0


def test_a_model_is_as_young_as_its_youngest_file(tmp_path: Path):
    cache = HubCache(tmp_path, limit=1000)
    config, weights = put(cache, "a", 100, 10**9, "config.json"), put(cache, "a", 400, 3 * 10**9)
    other = put(cache, "b", 400, 2 * 10**9)
    cache.make_room("weights.safetensors", cache.blob("d/m", "d"), 200, "d" * 40)
    assert [path.exists() for path in (config, weights, other)] == [True, True, False]


def test_files_of_the_same_commit_are_not_evicted(tmp_path: Path):
    cache = HubCache(tmp_path, limit=1000)
    shard = put(cache, "a", 600, 10)
    with pytest.raises(CheckpointError, match="raise PETAL_CACHE_GB"):
        cache.make_room("weights.safetensors", cache.blob("a/m", "new"), 600, "a" * 40)
    assert shard.exists()


def test_what_broken_downloads_left_counts_and_goes_first(tmp_path: Path):
    cache = HubCache(tmp_path, limit=1000)
    model = put(cache, "a", 300, 10)
    left, running = (cache.blob(f"{name}/m", f"{name}.incomplete") for name in "bc")
    for path in (left, running):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(300))
    os.utime(left, (time.time() - 3600,) * 2)
    cache.make_room("weights.safetensors", cache.blob("d/m", "d"), 400, "d" * 40)
    assert [path.exists() for path in (left, running, model)] == [False, True, True]
    cache.make_room("weights.safetensors", cache.blob("d/m", "d"), 500, "d" * 40)
    assert [path.exists() for path in (running, model)] == [True, False], "another process still writes it"


def test_the_limit_holds_while_a_model_is_fetched(hub: FakeHub, cache: HubCache, model: Path):
    shards = sorted(model.glob("*.safetensors"))
    other = put(cache, "a", 6000, 10)
    cache.limit = 6000 + 1000 + sum(path.stat().st_size for path in shards[1:3])
    folder = folder_of(cache)
    for shard in shards[1:3]:
        folder.find("config.json")
        folder.find(shard.name)
    assert other.exists()
    folder.find(shards[3].name)
    assert not other.exists()
    with pytest.raises(CheckpointError, match="raise PETAL_CACHE_GB"):
        folder.find(shards[0].name)
    assert sum(path.stat().st_size for path in cache.folder.rglob("blobs/*")) <= cache.limit


def test_the_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PETAL_CACHE_GB", "1.5")
    assert HubCache.of_user().limit == 1_500_000_000
    for text in ("much", "nan", "inf"):
        monkeypatch.setenv("PETAL_CACHE_GB", text)
        with pytest.raises(CheckpointError, match="a number of gigabytes"):
            HubCache.of_user()
