"""Checkpoints pushed to a real object store: pushes are atomic and resumable, and concurrent ones never mix."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from farm.errors import ModelError, NotFound, StorageUnavailable
from farm.objects import large_objects
from farm.objects.large_objects import Outgoing, upload_files
from farm.objects.model_store import PREFIX, ModelStore, check_name
from farm.objects.storage import Storage
from workers import tiny
from workers.models.remote import find_remote


@pytest.fixture
def store(storage: Storage) -> ModelStore:
    return ModelStore(storage)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the small model for the test to modify."""
    shutil.copytree(tiny.WEIGHTS, tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path) -> None:
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "changed": os.urandom(4).hex()}))


def test_a_model_is_pushed_found_listed_and_deleted(store: ModelStore, storage: Storage, folder: Path) -> None:
    storage.put("models/raw/model_index.json", b"{}")  # without a manifest it is not a pushed model
    first = store.push(folder, "small", "ann")
    assert first.new
    assert first.sent_bytes == first.manifest.bytes > 1_000_000
    assert store.find("small") == first.manifest
    assert "README.md" not in first.manifest.hashes

    again = store.push(folder, "small", "bob")
    assert (again.manifest, again.new, again.sent_bytes) == (first.manifest, False, 0)

    change(folder)
    second = store.push(folder, "small", "bob")
    assert second.manifest.version != first.manifest.version
    assert store.find("small") == second.manifest
    assert store.find(f"small@{first.manifest.version}") == store.find(f"small@{first.manifest.version[:8]}")
    (stored,) = store.models()
    assert (stored.manifest, stored.older) == (second.manifest, 1)

    with pytest.raises(ModelError, match="is the current version"):
        store.delete(f"small@{second.manifest.version[:8]}")
    store.delete(f"small@{first.manifest.version[:8]}")
    with pytest.raises(NotFound, match="no version that begins"):
        store.find(f"small@{first.manifest.version[:8]}")
    assert store.find("small") == second.manifest
    store.delete("small")
    assert list(store.models()) == []
    assert list(storage.keys(PREFIX)) == ["models/raw/model_index.json"]
    with pytest.raises(NotFound, match="farm models push DIR small"):
        store.find("small")


def test_a_source_names_the_same_model_wherever_its_manifest_lies(
    store: ModelStore, storage: Storage, folder: Path
) -> None:
    manifest = store.push(folder, "small", "ann").manifest
    place = f"s3://{storage.bucket}/models/small"
    sources = ["farm:small", f"farm:small@{manifest.version[:10]}", place, f"{place}/", f"{place}/{manifest.version}"]
    found = [find_remote(storage, source) for source in sources]
    assert {one.version for one in found} == {manifest.version}
    assert {one.prefix for one in found} == {f"models/small/{manifest.version}/"}
    for wrong in ("farm:", "farm:../x", "farm:small@xyz", "farm:small@abc", "farm:small/x", "farm:sm\0all"):
        with pytest.raises(ModelError, match="no name of a pushed model"):
            find_remote(storage, wrong)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a,b", "a=b", "a@b", "\0", "a\\b", "x" * 101, "ü"])
def test_a_name_that_could_mean_something_else_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="can't be called"):
        check_name(name)


def test_nothing_is_sent_of_a_folder_that_is_no_checkpoint_or_under_a_wrong_name(
    store: ModelStore, storage: Storage, folder: Path
) -> None:
    with pytest.raises(ModelError, match="can't be called"):
        store.push(folder, "../small", "ann")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights at all"):
        store.push(folder, "small", "ann")
    assert not list(storage.keys())


def test_a_file_that_is_written_to_meanwhile_is_not_pushed(store: ModelStore, folder: Path) -> None:
    def bar(what: str, _: int) -> "Quiet":
        if what.startswith("sending"):
            change(folder)
        return Quiet()

    with pytest.raises(ModelError, match="was written to while it was pushed"):
        store.push(folder, "small", "ann", bar)
    assert list(store.models()) == []


class Quiet:
    """A progress bar that shows nothing."""

    def __enter__(self):
        return lambda _: None

    def __exit__(self, *_: object) -> None:
        pass


def test_of_two_who_push_different_models_under_a_name_one_is_told(store: ModelStore, folder: Path) -> None:
    before = store.push(folder, "small", "ann").manifest

    def bar(what: str, _: int) -> Quiet:
        if what.startswith("hashing"):
            other = folder.with_name("other")
            shutil.copytree(folder, other)
            change(other)
            store.push(other, "small", "bob")
        return Quiet()

    change(folder)
    with pytest.raises(StorageUnavailable, match="another client pushed small"):
        store.push(folder, "small", "ann", bar)
    assert store.find("small").pushed_by == "bob"
    assert store.find("small").version != before.version


# --- parts -------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from farm.objects import large_objects
from farm.objects.model_store import ModelStore
from farm.objects.storage import Storage
from farm.runtime import parallel
from farm.settings import Settings

large_objects._PART_BYTES, parallel._THREADS, parallel._AHEAD = 5 * 2**20, 2, 2
class Bar:
    def __enter__(self): return self.told
    def __exit__(self, *_): pass
    def __init__(self, what, total): self.left = total // 2 if what.startswith("sending") else total + 1
    def told(self, count):
        self.left -= count
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
ModelStore(Storage(Settings.load())).push(Path(sys.argv[1]), "big", "ann", Bar)
"""


def test_a_push_that_was_killed_shows_nothing_and_the_next_one_goes_on(
    store: ModelStore, storage: Storage, folder: Path, s3: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    grow(weights, 40 * 2**20)
    env = {f"FARM_{name.upper()}": value for name, value in s3.items()}
    services = {"FARM_DATABASE_URL": "sqlite://", "FARM_BROKER_URL": "redis://127.0.0.1:1/0"}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env={**os.environ, **services, **env})
    assert killed.returncode == -signal.SIGKILL
    assert list(store.models()) == []
    with pytest.raises(NotFound):
        store.find("big")
    monkeypatch.setattr(large_objects, "_PART_BYTES", 5 * 2**20)
    pushed = store.push(folder, "big", "ann")
    assert pushed.new
    assert 0 < pushed.sent_bytes < pushed.manifest.bytes * 3 // 4
    key = f"models/big/{pushed.manifest.version}/unet/{weights.name}"
    assert storage.get(key) == weights.read_bytes()


def grow(weights: Path, count: int) -> None:
    """Enlarge a safetensors file by a tensor of noise that the model does not load."""
    data = weights.read_bytes()
    length = int.from_bytes(data[:8], "little")
    tensors = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    tensors["noise"] = {"dtype": "U8", "shape": [count], "data_offsets": [end, end + count]}
    header = json.dumps(tensors).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :] + os.urandom(count))


def test_a_delete_leaves_no_part_of_a_push_that_broke_off(
    store: ModelStore, storage: Storage, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_objects, "_PART_BYTES", 5 * 2**20)
    version = store.push(folder, "small", "ann").manifest.version
    path = tmp_path / "large"
    path.write_bytes(os.urandom(11 * 2**20))
    key = f"{PREFIX}small/{version}/large"

    def break_off(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        upload_files(storage, [Outgoing(path, key, path.stat().st_size, "0" * 64)], break_off)
    assert re.findall("large", str(uploads(storage)))
    store.delete("small")
    assert uploads(storage) == []
    assert list(storage.keys()) == []


def uploads(storage: Storage) -> list[str]:
    with storage.client("uploads") as s3:
        return [one["Key"] for one in s3.list_multipart_uploads(Bucket=storage.bucket).get("Uploads", ())]
