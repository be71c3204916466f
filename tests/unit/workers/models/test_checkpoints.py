import dataclasses
import json
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from farm.errors import ModelError
from workers.models import checkpoints
from workers.models.checkpoints import Checkpoint, Family
from workers.pipelines import families

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}

CLASSES = {
    "scheduler": "PNDMScheduler",
    "text_encoder": "CLIPTextModel",
    "tokenizer": "CLIPTokenizer",
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
}


def known() -> dict[str, Family]:
    return {name: module.FAMILY for name, module in families().items()}


def open_checkpoint(source: str) -> Checkpoint:
    return checkpoints.open_checkpoint(source, known())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with every part of a Stable Diffusion checkpoint, and empty weights."""
    index: dict[str, object] = {"_class_name": "StableDiffusionPipeline", "safety_checker": [None, None]}
    for part in known()["StableDiffusionPipeline"].parts:
        library = "transformers" if part in ("text_encoder", "tokenizer") else "diffusers"
        index[part] = [library, CLASSES[part]]
        (tmp_path / part).mkdir()
        if part in WEIGHTS:
            (tmp_path / part / "config.json").write_text("{}")
            save_file({}, tmp_path / part / WEIGHTS[part])
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return tmp_path


def edit_index(folder: Path, **values: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_whole_checkpoint_opens(folder: Path) -> None:
    checkpoint = open_checkpoint(str(folder))
    assert checkpoint.path == folder
    assert checkpoint.family == "StableDiffusionPipeline"
    assert len(checkpoint.sha256) == 64


def test_the_hash_is_that_of_what_is_loaded_wherever_it_lies(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = open_checkpoint(str(folder)).sha256
    (folder / "README.md").write_text("about it")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant nobody loads")
    moved = tmp_path_factory.mktemp("elsewhere") / "model"
    folder.rename(moved)
    assert open_checkpoint(str(moved)).sha256 == before


@pytest.mark.parametrize(
    "file",
    ["model_index.json", f"unet/{WEIGHTS['unet']}", "unet/config.json", "tokenizer/merges.txt", "scheduler/any.json"],
)
def test_another_byte_in_what_is_loaded_is_another_hash(folder: Path, file: str) -> None:
    before = open_checkpoint(str(folder)).sha256
    with (folder / file).open("ab") as stream:
        stream.write(b" ")
    assert open_checkpoint(str(folder)).sha256 != before


def test_shards_are_weights_too(folder: Path) -> None:
    (folder / "unet" / WEIGHTS["unet"]).unlink()
    for shard in ("00001", "00002"):
        save_file({}, folder / "unet" / f"diffusion_pytorch_model-{shard}-of-00002.safetensors")
    open_checkpoint(str(folder))


def test_a_folder_without_an_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no model_index\.json"):
        open_checkpoint(str(tmp_path))


def test_an_index_that_is_no_json_is_named(folder: Path) -> None:
    (folder / "model_index.json").write_text("<html>")
    with pytest.raises(ModelError, match=r"can't read .*model_index\.json"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["StableCascadePipeline", "NullPipeline", None, ["StableDiffusionPipeline"]])
def test_a_family_the_farm_can_not_render_is_named(folder: Path, name: object) -> None:
    edit_index(folder, _class_name=name)
    with pytest.raises(ModelError, match=r"known are .*StableDiffusionPipeline"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("part", CLASSES)
def test_a_missing_part_is_named(folder: Path, part: str) -> None:
    (folder / part).rename(folder / "elsewhere")
    with pytest.raises(ModelError, match=f"the checkpoint's {part} is missing"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("entry", [None, [None, None]])
def test_a_part_the_index_does_not_name_is_named(folder: Path, entry: object) -> None:
    edit_index(folder, vae=entry)
    with pytest.raises(ModelError, match="names no vae"):
        open_checkpoint(str(folder))


def test_a_part_with_code_of_its_own_is_refused(folder: Path) -> None:
    edit_index(folder, unet=["my_unet", "MyUNet"])
    with pytest.raises(ModelError, match=r"unet: needs code of its own \(my_unet\)"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"])
def test_weights_that_are_no_plain_safetensors_are_named(folder: Path, name: str) -> None:
    (folder / "unet" / WEIGHTS["unet"]).rename(folder / "unet" / name)
    with pytest.raises(ModelError, match=f"unet: needs .* but there is only {name}"):
        open_checkpoint(str(folder))


def test_a_part_without_weights_is_named(folder: Path) -> None:
    (folder / "vae" / WEIGHTS["vae"]).unlink()
    with pytest.raises(ModelError, match="but there is no weights at all"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./gone", "nowhere"])
def test_a_source_that_is_neither_folder_nor_hub_id_is_named(source: str) -> None:
    with pytest.raises(ModelError, match="no folder"):
        open_checkpoint(source)


def test_of_a_hub_id_only_what_its_family_loads_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        assert repo_id == "org/name"
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert open_checkpoint("org/name").path == folder
    index, parts = asked
    assert index == ["model_index.json"]
    assert "unet/diffusion_pytorch_model.safetensors" in parts
    assert "tokenizer/*.txt" in parts
    assert not [
        pattern for pattern in parts if pattern.endswith((".bin", "/*", "*.safetensors")) and "-of-" not in pattern
    ]
    assert not [pattern for pattern in parts if pattern.startswith("safety_checker")]


def test_without_weights_only_configs_are_asked_for_and_code_is_refused_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    found = checkpoints.open_checkpoint("org/name", known(), weights=False)
    assert (found.family, found.nbytes) == ("StableDiffusionPipeline", 0)
    assert not [pattern for pattern in asked[1] if "safetensors" in pattern]
    with pytest.raises(ModelError, match="no weights at all"):
        open_checkpoint(str(folder))
    (folder / "unet" / "config.json").write_text('{"auto_map": {"AutoModel": "mine.Model"}}')
    with pytest.raises(ModelError, match="needs code of its own"):
        checkpoints.open_checkpoint(str(folder), known(), weights=False)


def test_a_hub_that_does_not_answer_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: object, **__: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match="can't download 'org/name' from the hub: no route"):
        open_checkpoint("org/name")


def test_a_part_that_a_family_can_do_without_may_be_left_out(folder: Path) -> None:
    family = dataclasses.replace(known()["StableDiffusionPipeline"], optional=("unet",))
    edit_index(folder, unet=[None, None])
    found = checkpoints.open_checkpoint(str(folder), {family.name: family})
    assert "unet" not in found.parts
    with pytest.raises(ModelError, match="names no unet"):
        open_checkpoint(str(folder))


def test_a_null_source_is_known_by_its_parameters() -> None:
    assert open_checkpoint("null:").sha256 != open_checkpoint("null:?width=128").sha256
    assert open_checkpoint("null:?width=128").family == "NullPipeline"
