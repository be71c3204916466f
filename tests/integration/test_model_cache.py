"""The model cache that a machine's processes share: each model is fetched once, complete, verified, within its size."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from farm.errors import ModelError, ModelUnavailable, NotFound, StorageUnavailable
from farm.objects.model_files import MANIFEST, needed_files
from farm.objects.model_store import ModelStore
from farm.objects.storage import Storage
from farm.settings import Settings
from tests.chaos.proxy import Proxy
from tests.integration.conftest import wait_until
from tests.integration.test_model_store import change, grow
from workers import tiny
from workers.models import cache as model_cache
from workers.models import fetching as model_fetching
from workers.models.cache import ModelCache
from workers.models.checkpoints import Family, open_checkpoint

FAMILY = Family("StableDiffusionPipeline", ("scheduler", "text_encoder", "tokenizer", "unet", "vae"))
FAMILIES = {FAMILY.name: FAMILY}


class Loaded:
    """A loaded model."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.sha256 = open_checkpoint(folder, FAMILIES).sha256


@pytest.fixture
def settings(s3: Mapping[str, str | None]) -> Settings:
    return Settings(database_url="sqlite://", broker_url="redis://127.0.0.1:1/0", **s3)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the small model for the test to modify."""
    shutil.copytree(tiny.WEIGHTS, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path, storage: Storage) -> ModelCache:
    return ModelCache(tmp_path / "cache", storage)


def versions(cache: ModelCache) -> set[str]:
    return {path.name for path in cache._folder.iterdir() if path.name != "locks"}


def test_what_is_fetched_is_what_was_pushed_and_is_fetched_once(
    cache: ModelCache, storage: Storage, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    manifest = ModelStore(storage).push(folder, "small", "ann").manifest
    model = cache.load("farm:small", Loaded)
    assert model.sha256 == open_checkpoint(str(folder), FAMILIES).sha256 == manifest.version
    assert model.folder.name == manifest.version
    assert versions(cache) == {manifest.version}
    assert "fetched farm:small, 10 files" in caplog.text
    caplog.clear()
    assert cache.load(f"s3://{storage.bucket}/models/small", Loaded).folder == model.folder
    assert "fetch" not in caplog.text
    assert cache.weights_bytes("farm:small") == sum(f.stat().st_size for f in folder.glob("*/*.safetensors"))


def test_the_configs_of_a_model_come_without_its_weights_and_do_not_stay(
    cache: ModelCache, storage: Storage, folder: Path
) -> None:
    ModelStore(storage).push(folder, "small", "ann")
    there = {path for path in needed_files(folder) if not path.endswith(".safetensors")}
    folders = []

    def load(configs: str) -> set[str]:
        folders.append(Path(configs))
        return {path.relative_to(configs).as_posix() for path in Path(configs).rglob("*.*")}

    assert cache.load_configs("farm:small", load) == there
    assert not folders[0].exists()
    assert cache.load_configs(str(folder), lambda found: found) == str(folder)
    with pytest.raises(NotFound):
        cache.load_configs("farm:gone", load)


def test_a_worker_keeps_to_the_version_it_has_found_and_the_next_takes_the_new_one(
    cache: ModelCache, storage: Storage, folder: Path
) -> None:
    old = ModelStore(storage).push(folder, "small", "ann").manifest.version
    assert cache.load("farm:small", Loaded).folder.name == old
    change(folder)
    new = ModelStore(storage).push(folder, "small", "ann").manifest.version
    assert cache.load("farm:small", Loaded).folder.name == old
    after = ModelCache(cache._folder, storage)
    assert after.load("farm:small", Loaded).folder.name == new
    assert after.load(f"farm:small@{old[:12]}", Loaded).folder.name == old


def test_a_mere_prefix_is_kept_too_and_fetched_anew_when_it_has_changed(
    cache: ModelCache, storage: Storage, folder: Path
) -> None:
    source = f"s3://{storage.bucket}/theirs/small"
    for path in folder.rglob("*.*"):
        storage.put(f"theirs/small/{path.relative_to(folder).as_posix()}", path.read_bytes())
    storage.put("theirs/small/unet/evil.py", b"raise SystemExit")
    first = cache.load(source, Loaded).folder
    assert not (first / "unet" / "evil.py").exists()
    assert not (first / "README.md").exists()
    assert ModelCache(cache._folder, storage).load(source, Loaded).folder == first
    change(folder)
    storage.put(
        "theirs/small/scheduler/scheduler_config.json", (folder / "scheduler/scheduler_config.json").read_bytes()
    )
    assert ModelCache(cache._folder, storage).load(source, Loaded).folder != first
    with pytest.raises(ModelError, match="there is nothing under"):
        cache.load(f"s3://{storage.bucket}/theirs/gone", Loaded)
    with pytest.raises(ModelError, match="no model 'gone' was pushed"):
        cache.load("farm:gone", Loaded)


# --- damage --------------------------------------------------------------------------------------------------------


def test_an_object_that_was_changed_is_refused_by_its_name_and_nothing_is_loaded(
    cache: ModelCache, storage: Storage, folder: Path
) -> None:
    version = ModelStore(storage).push(folder, "small", "ann").manifest.version
    key = f"models/small/{version}/vae/diffusion_pytorch_model.safetensors"
    data = storage.get(key)
    storage.put(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ModelError, match=f"{key} is not what was pushed") as raised:
        cache.load("farm:small", Loaded)
    assert not isinstance(raised.value, ModelUnavailable)
    assert not (cache._folder / version).exists()
    storage.put(key, data)
    assert cache.load("farm:small", Loaded).sha256 == version


def test_a_manifest_of_another_model_does_not_pass_for_the_version_that_was_asked_for(
    cache: ModelCache, storage: Storage, folder: Path
) -> None:
    store = ModelStore(storage)
    old = store.push(folder, "small", "ann").manifest.version
    change(folder)
    new = store.push(folder, "small", "ann").manifest.version
    storage.put(f"models/small/{old}/{MANIFEST}", storage.get(f"models/small/{new}/{MANIFEST}"))
    with pytest.raises(ModelError, match="is another version"):
        cache.load(f"farm:small@{old}", Loaded)


def test_what_was_damaged_in_the_cache_is_fetched_anew(
    cache: ModelCache, storage: Storage, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    version = ModelStore(storage).push(folder, "small", "ann").manifest.version
    first = cache.load("farm:small", Loaded)  # a loaded model does not prevent the repair
    weights = first.folder / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    damages = {
        "a byte": (lambda: weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1])), 1),
        "the end": (lambda: weights.write_bytes(data[:-1]), 1),
        "a file": (weights.unlink, 1),
        "the manifest": (lambda: (first.folder / MANIFEST).write_text("{}"), 10),
        "everything": (lambda: shutil.rmtree(first.folder), 10),
    }
    for what, (damage, files) in damages.items():
        damage()
        caplog.clear()
        assert cache.load("farm:small", Loaded).sha256 == version, what
        assert weights.read_bytes() == data, what
        assert f"fetched farm:small, {files} files" in caplog.text, what
        assert versions(cache) == {version}, what


def test_a_model_that_can_not_be_loaded_though_it_is_whole_is_fetched_once(
    cache: ModelCache, storage: Storage, folder: Path
) -> None:
    ModelStore(storage).push(folder, "small", "ann")
    tries = []

    def load(folder: str) -> Loaded:
        tries.append(folder)
        raise ModelError("not of a family we know")

    with pytest.raises(ModelError, match="not of a family"):
        cache.load("farm:small", load)
    assert len(tries) == 1


# --- eviction ------------------------------------------------------------------------------------------------------


def three(storage: Storage, folder: Path) -> dict[str, str]:
    """Push three models of the same size; returns their versions by name."""
    found = {}
    for name in ("a", "b", "c"):
        change(folder)
        found[name] = ModelStore(storage).push(folder, name, "ann").manifest.version
    return found


def test_the_longest_unused_leaves_for_the_next_and_what_is_in_use_stays(
    tmp_path: Path, storage: Storage, folder: Path
) -> None:
    pushed = three(storage, folder)
    size = ModelStore(storage).find("a").bytes
    cache = ModelCache(tmp_path / "cache", storage, int(2.5 * size))
    in_use = cache.load("farm:a", Loaded)
    cache.load("farm:b", Loaded)
    cache.load("farm:c", Loaded)
    assert versions(cache) == {pushed["a"], pushed["c"]}
    # Another process holds c, so nothing can be evicted.
    with holder(storage, cache._folder, "farm:c"), pytest.raises(ModelUnavailable, match="else in it is in use"):
        cache.load("farm:b", Loaded)
    assert versions(cache) == {pushed["a"], pushed["c"]}
    cache.load("farm:b", Loaded)
    assert versions(cache) == {pushed["a"], pushed["b"]}
    del in_use
    cache.load("farm:b", Loaded)
    cache.load("farm:c", Loaded)
    assert versions(cache) == {pushed["b"], pushed["c"]}


def test_what_a_fetch_left_that_nobody_went_on_with_is_swept(cache: ModelCache, storage: Storage, folder: Path) -> None:
    version = ModelStore(storage).push(folder, "small", "ann").manifest.version
    left = {}
    for digit, hours in (("a", 25), ("b", 1)):
        left[digit] = cache._part(digit * 64)
        left[digit].mkdir(parents=True)
        (left[digit] / "model_index.json").write_text("{}")
        cache._lock(f"{digit * 64}.used").close()
        os.utime(cache._locks / f"{digit * 64}.used", (time.time() - hours * 3600,) * 2)
    cache.load("farm:small", Loaded)
    assert versions(cache) == {version, left["b"].name}


def test_a_model_larger_than_the_cache_or_the_disk_is_refused_before_it_is_fetched(
    tmp_path: Path, storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ModelStore(storage).push(folder, "small", "ann")
    cache = ModelCache(tmp_path / "cache", storage, 1_000_000)
    with pytest.raises(ModelError, match=r"more than the cache may hold \(0.00, FARM_MODEL_CACHE_SIZE\)") as raised:
        cache.load("farm:small", Loaded)
    assert not isinstance(raised.value, ModelUnavailable)
    cache = ModelCache(tmp_path / "cache", storage)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(ModelUnavailable, match=r"GB too few in the cache .* and there is nothing else in it"):
        cache.load("farm:small", Loaded)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(total=1_000_000))
    with pytest.raises(ModelError, match="more than the disk"):
        cache.load("farm:small", Loaded)
    assert versions(cache) == set()


def test_a_disk_that_fills_up_meanwhile_is_told_and_left_as_it_was(
    cache: ModelCache, storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ModelStore(storage).push(folder, "small", "ann")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(model_fetching.os, "fsync", full)
    with pytest.raises(ModelUnavailable, match=r"the disk of the cache .* is full: farm:small takes"):
        cache.load("farm:small", Loaded)
    assert versions(cache) == set()


# --- several processes ---------------------------------------------------------------------------------------------

WORKER = """
import sys, time
from pathlib import Path
from farm.log import configure
from farm.settings import Settings
from farm.objects.storage import Storage
from workers.models import fetching
from workers.models.cache import ModelCache

fetching._PIECE_BYTES = 2**18

class Loaded:
    pass

configure()
Loaded.held = ModelCache(Path(sys.argv[1]), Storage(Settings.load())).load(sys.argv[2], lambda folder: Loaded())
print("loaded", flush=True)
sys.stdin.read()
"""


def start(storage: Storage, cache: Path, source: str, endpoint: str | None = None) -> subprocess.Popen[str]:
    given = storage._settings
    secret = given.s3_secret_access_key
    env = {
        "FARM_DATABASE_URL": given.database_url,
        "FARM_BROKER_URL": given.broker_url,
        "FARM_S3_BUCKET": given.s3_bucket,
        "FARM_S3_ENDPOINT_URL": endpoint or given.s3_endpoint_url or "",
        "FARM_S3_ACCESS_KEY_ID": given.s3_access_key_id or "",
        "FARM_S3_SECRET_ACCESS_KEY": secret.get_secret_value() if secret else "",
    }
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(cache), source],
        env={**os.environ, **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@contextlib.contextmanager
def holder(storage: Storage, cache: Path, source: str) -> Iterator[None]:
    """A process that has a model loaded."""
    process = start(storage, cache, source)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "loaded\n"
        yield
    finally:
        process.communicate("", timeout=30)


@pytest.fixture
def proxy(settings: Settings) -> Iterator[Proxy]:
    """A proxy between a process and the object store."""
    proxy = Proxy(urlsplit(settings.s3_endpoint_url or "").port or 0)
    yield proxy
    proxy.close()


def large(storage: Storage, folder: Path) -> str:
    """Push a model that takes several pieces; returns its version."""
    grow(folder / "unet" / "diffusion_pytorch_model.safetensors", 8 * 2**20)
    return ModelStore(storage).push(folder, "large", "ann").manifest.version


def test_two_workers_that_start_at_once_fetch_a_model_once(tmp_path: Path, storage: Storage, folder: Path) -> None:
    version = large(storage, folder)
    two = [start(storage, tmp_path / "cache", "farm:large") for _ in range(2)]
    said = []
    for process in two:
        out, err = process.communicate("", timeout=60)
        assert (process.returncode, out) == (0, "loaded\n"), err
        said.append(err)
    assert "".join(said).count(" fetched farm:large") == 1
    assert (tmp_path / "cache" / version / "model_index.json").exists()


def test_after_a_kill_in_the_middle_of_a_fetch_the_next_one_goes_on(
    tmp_path: Path, storage: Storage, folder: Path, proxy: Proxy, settings: Settings
) -> None:
    version = large(storage, folder)
    proxy.delay_seconds = 0.05
    slow = f"http://127.0.0.1:{proxy.port}"
    process = start(storage, tmp_path / "cache", "farm:large", slow)
    part = tmp_path / "cache" / f"{version}.part"
    weights = part / "unet" / "diffusion_pytorch_model.safetensors"
    wait_until(lambda: weights.exists() and weights.stat().st_size >= 2**20, "some of it is there")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    got = sum(path.stat().st_size for path in part.rglob("*") if path.is_file())
    assert got < ModelStore(storage).find("large").bytes
    asked = []
    real = model_fetching.read_range
    cache = ModelCache(tmp_path / "cache", storage)

    def read(*args: object) -> bytes:
        asked.append(args[4])
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_fetching, "read_range", read)
        assert cache.load("farm:large", Loaded).sha256 == version
    assert sum(asked) == ModelStore(storage).find("large").bytes - got
    assert versions(cache) == {version}


def test_a_store_that_is_cut_off_and_comes_back_costs_no_more_than_the_pieces_on_their_way(
    tmp_path: Path, storage: Storage, folder: Path, proxy: Proxy
) -> None:
    version = large(storage, folder)
    proxy.delay_seconds = 0.02
    process = start(storage, tmp_path / "cache", "farm:large", f"http://127.0.0.1:{proxy.port}")
    weights = tmp_path / "cache" / f"{version}.part" / "unet" / "diffusion_pytorch_model.safetensors"
    wait_until(lambda: weights.exists() and weights.stat().st_size >= 2**20, "some of it is there")
    proxy.cut()
    proxy.delay_seconds = 0
    out, err = process.communicate("", timeout=60)
    assert (process.returncode, out) == (0, "loaded\n"), err
    assert (tmp_path / "cache" / version / "model_index.json").exists()


def test_a_store_that_is_away_makes_no_wrong_model_and_what_came_is_kept(
    cache: ModelCache, storage: Storage, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = large(storage, folder)
    monkeypatch.setattr(model_fetching, "_OUTAGE_SECONDS", 0.0)
    monkeypatch.setattr(model_fetching, "_PIECE_BYTES", 2**18)
    real = model_fetching.read_range
    part = cache._part(version)

    def here() -> int:
        return sum(path.stat().st_size for path in part.rglob("*.safetensors"))

    def read(*args: object) -> bytes:
        if here() > 2**20:
            raise StorageUnavailable("it is away")
        return real(*args)

    monkeypatch.setattr(model_fetching, "read_range", read)
    with pytest.raises(ModelUnavailable, match="can't fetch farm:large: it is away"):
        cache.load("farm:large", Loaded)
    assert here() > 2**20
    assert versions(cache) == {part.name}


def test_a_worker_that_is_told_to_stop_waits_for_no_fetch(tmp_path: Path, storage: Storage, folder: Path) -> None:
    version = large(storage, folder)
    cache = ModelCache(tmp_path / "cache", storage)
    with cache._lock(f"{version}.fetching") as other:
        assert model_cache._try(other, model_cache.fcntl.LOCK_EX)
        cache._stopping.set()
        began = time.monotonic()
        with pytest.raises(ModelUnavailable, match="this worker stops"):
            cache.load("farm:large", Loaded)
        assert time.monotonic() - began < 5
