"""Checkpoints are loaded only from safetensors files in their own folder, and their code is never run."""

import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from botocore import UNSIGNED
from botocore.config import Config
from botocore.stub import ANY, Stubber

from farm.errors import ModelError
from farm.objects.storage import Storage
from farm.settings import Settings
from workers import tiny
from workers.models.cache import ModelCache
from workers.models.checkpoints import Family, open_checkpoint

FAMILY = Family("StableDiffusionPipeline", ("scheduler", "text_encoder", "tokenizer", "unet", "vae"))
PLAIN = {"text_encoder": "model.safetensors", "unet": "diffusion_pytorch_model.safetensors"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the small model for the test to tamper with."""
    return Path(shutil.copytree(tiny.WEIGHTS, tmp_path / "model"))


def refused(folder: Path, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        open_checkpoint(str(folder), {FAMILY.name: FAMILY})


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo pwned",)


def test_the_model_itself_is_accepted(folder: Path) -> None:
    assert open_checkpoint(str(folder), {FAMILY.name: FAMILY}).nbytes > 0


@pytest.mark.parametrize("part", PLAIN)
@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt", ".pth"])
def test_pickled_weights_are_refused(folder: Path, part: str, suffix: str) -> None:
    weights = folder / part / PLAIN[part]
    weights.unlink()
    weights.with_suffix(suffix).write_bytes(pickle.dumps(_Evil()))
    refused(folder, f"{part}: needs .*safetensors")


@pytest.mark.parametrize("part", PLAIN)
@pytest.mark.parametrize(
    "shard", ["evil.bin", "../evil.bin", "/etc/passwd", "../vae/diffusion_pytorch_model.safetensors", 5, ["x"]]
)
def test_an_index_of_shards_names_safetensors_of_its_own_folder_only(folder: Path, part: str, shard: object) -> None:
    for place in (folder, folder / part):
        (place / "evil.bin").write_bytes(pickle.dumps(_Evil()))
    edit(folder / part / f"{PLAIN[part]}.index.json", metadata={}, weight_map={"a": PLAIN[part], "b": shard})
    refused(folder, "names .* no safetensors file of this part")


@pytest.mark.parametrize("weight_map", [None, [], "evil.bin"])
def test_an_index_without_a_map_is_refused(folder: Path, weight_map: object) -> None:
    edit(folder / "unet" / f"{PLAIN['unet']}.index.json", weight_map=weight_map)
    refused(folder, "has no weight_map")


def test_an_index_of_the_shards_that_are_there_is_accepted(folder: Path) -> None:
    shards = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    (folder / "unet" / PLAIN["unet"]).rename(folder / "unet" / shards[0])
    shutil.copy(folder / "unet" / shards[0], folder / "unet" / shards[1])
    edit(folder / "unet" / f"{PLAIN['unet']}.index.json", metadata={}, weight_map={"a": shards[0], "b": shards[1]})
    open_checkpoint(str(folder), {FAMILY.name: FAMILY})


@pytest.mark.parametrize(
    ("part", "entry"),
    [
        ("unet", ["diffusers", "AutoModel"]),
        ("unet", ["diffusers", "DiffusionPipeline"]),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("text_encoder", ["transformers", "pipeline"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("tokenizer", ["transformers", "RagRetriever"]),
        ("scheduler", ["diffusers", "ModularPipeline"]),
        ("scheduler", ["diffusers", ["evil", "Scheduler"]]),
        ("vae", ["diffusers", "utils"]),
        ("vae", ["os", "system"]),
        ("vae", ["pipeline", "AutoencoderKL"]),
        ("vae", [["diffusers"], "AutoencoderKL"]),
    ],
)
def test_a_class_that_could_bring_code_of_its_own_is_refused(folder: Path, part: str, entry: object) -> None:
    edit(folder / "model_index.json", **{part: entry})
    refused(folder, f"{part}: (can't load|needs code of its own)")


def test_code_beside_the_weights_is_refused_where_they_need_it(folder: Path) -> None:
    edit(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "evil.Evil"})
    (folder / "text_encoder" / "evil.py").write_text("raise SystemExit('pwned')")
    refused(folder, "text_encoder: needs code of its own")


@pytest.mark.parametrize("way", ["config.json", "adapter_config.json"])
def test_weights_from_elsewhere_are_refused(folder: Path, way: str) -> None:
    edit(folder / "text_encoder" / way, transformers_weights="adapter_model.bin", base_model_name_or_path="/evil")
    refused(folder, "text_encoder: takes its weights from elsewhere")


def test_json_that_nests_too_deep_is_an_error_and_no_crash(folder: Path) -> None:
    (folder / "model_index.json").write_text("[" * 200_000)
    refused(folder, "can't read")


# --- from the object store -----------------------------------------------------------------------------------------


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Storage, Stubber]]:
    """A storage with a stubbed S3 client: a real service would normalize such keys."""
    storage = Storage(Settings(database_url="", broker_url="", s3_bucket="b"))
    client = boto3.client("s3", region_name="us-east-1", config=Config(signature_version=UNSIGNED))
    monkeypatch.setattr(Storage, "_client", lambda *_, **__: client)
    with Stubber(client) as stub:
        yield storage, stub
    storage.close()


@pytest.mark.parametrize("key", ["m/../../evil.txt", "m//etc/evil.txt", "m/a/../../../evil.txt", "m/.."])
def test_no_key_of_a_model_is_written_outside_its_folder(
    stubbed: tuple[Storage, Stubber], tmp_path: Path, key: str
) -> None:
    storage, stub = stubbed
    contents = {"Contents": [{"Key": key, "Size": 4}], "IsTruncated": False}
    stub.add_client_error("get_object", "NoSuchKey", expected_params={"Bucket": "b", "Key": "m/farm-model.json"})
    stub.add_response("list_objects_v2", contents, {"Bucket": "b", "Prefix": "m/"})
    stub.add_client_error("get_object", expected_params={"Bucket": "b", "Key": ANY})  # not reached
    with pytest.raises(ModelError, match="nothing under"):
        ModelCache(tmp_path / "cache", storage).load("s3://b/m", str)
    assert not list(tmp_path.rglob("evil*"))
    assert not Path("/etc/evil.txt").exists()


def test_nothing_in_the_code_trusts_remote_code_or_reads_pickles() -> None:
    root = Path(tiny.__file__).parents[2]
    # workers/tiny is exempt: the training of the small model resumes from its own files.
    paths = {*root.glob("farm/**/*.py"), *root.glob("workers/**/*.py")} - {*root.glob("workers/tiny/*.py")}
    assert len(paths) > 50
    for path in paths:
        text = path.read_text(encoding="utf-8")
        for word in (
            "trust_remote_code",
            "custom_pipeline",
            "import pickle",
            "torch.load(",
            "yaml.load",
            "weights_only",
        ):
            assert word not in text, f"{path}: {word}"
