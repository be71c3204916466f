"""The files of a folder that form a checkpoint, the names allowed in a manifest, and the errors for all others."""

import json
import struct
from pathlib import Path

import pytest

from farm.errors import ModelError
from farm.objects.model_files import is_needed, needed_files, parse_manifest, version

ZEROS = "0" * 64


def safetensors(tensor_bytes: int = 4) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, tensor_bytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint with the extra files that such folders often contain."""
    folder = tmp_path / "model"
    index = {
        "_class_name": "StableDiffusionPipeline",
        "requires_safety_checker": True,
        "force_zeros": [None, None],
        "sizes": [64, 64],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
    }
    for part in ("scheduler", "tokenizer", "unet", "safety_checker"):
        (folder / part).mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "tokenizer" / "merges.txt").write_text("")
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(safetensors())
    for beside in ("README.md", "v1.ckpt", "unet/diffusion_pytorch_model.bin", "unet/evil.py", "unet/.cache.json"):
        (folder / beside).write_bytes(b"not this")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(safetensors())
    (folder / "safety_checker" / "model.safetensors").write_bytes(safetensors())
    return folder


def test_a_checkpoint_is_what_its_parts_load_and_nothing_beside_it(folder: Path) -> None:
    assert needed_files(folder) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/merges.txt",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]


def index(folder: Path, **values: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_folder_that_no_worker_could_open_is_refused_with_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    config = folder / "unet" / "config.json"

    def refused(said: str) -> None:
        with pytest.raises(ModelError, match=said):
            needed_files(folder)

    with pytest.raises(ModelError, match="is no folder"):
        needed_files(tmp_path / "nowhere")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    refused(r"model\.safetensors has \d+ bytes, and would have \d+ if it were whole")
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    refused("no safetensors file")
    weights.unlink()
    refused(r"needs model\.safetensors or diffusion_pytorch_model\.safetensors, but there is only .*\.bin")
    weights.write_bytes(whole)
    config.write_text('{"auto_map": {"AutoModel": "evil.Evil"}}')
    refused("needs code of its own")
    config.write_text("{}")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        '{"weight_map": {"w": "../../secret.safetensors"}}'
    )
    refused("names '../../secret.safetensors'")
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").unlink()
    index(folder, unet=["evil_package", "UNet"])
    refused("needs code of its own")
    index(folder, **{"unet": ["diffusers", "UNet2DConditionModel"], "../tokenizer": ["transformers", "CLIPTokenizer"]})
    refused("no name of a folder")
    (folder / "model_index.json").write_text("[]")
    refused("holds no JSON object")
    (folder / "model_index.json").unlink()
    refused("has no model_index.json")


def test_a_link_may_lead_into_the_hubs_cache_and_nowhere_else(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    merges = snapshot / "tokenizer" / "merges.txt"
    (tmp_path / "blobs").mkdir()
    merges.rename(tmp_path / "blobs" / "0123")
    merges.symlink_to(tmp_path / "blobs" / "0123")
    assert "tokenizer/merges.txt" in needed_files(snapshot)
    merges.unlink()
    merges.symlink_to("/etc/passwd")
    with pytest.raises(ModelError, match="leads out of the checkpoint"):
        needed_files(snapshot)


@pytest.mark.parametrize(
    "path",
    [
        "../model_index.json",
        "/etc/passwd.json",
        "unet/../../x.json",
        "unet/../x.json",
        "unet//x.json",
        "unet/a/x.json",
        "./model_index.json",
        "..\\x.json",
        "unet\\x.json",
        "unet/\0.json",
        "unet/x.json\n",
        "unet/.hidden.json",
        "unet/evil.py",
        "unet/pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "../unet/config.json",
        "",
        "unet/",
        "/config.json",
        "config.json",
        "safety_checker/model.safetensors",
        "unet/" + "x" * 200 + ".json",
    ],
)
def test_no_other_name_can_stand_in_a_manifest(path: str) -> None:
    assert not is_needed(path)
    hashes = {"model_index.json": ZEROS, path: ZEROS}
    with pytest.raises(ModelError, match=r"no manifest of a model: files\.1\.path"):
        parse_manifest(manifest(hashes), "here")


def manifest(hashes: dict[str, str], **values: object) -> str:
    files = [{"path": path, "bytes": 4, "sha256": sha256} for path, sha256 in hashes.items()]
    given = {"name": "m", "version": version(hashes), "family": "F", "files": files, "pushed_by": "me"}
    return json.dumps({**given, "pushed_at": "2026-01-01T00:00:00Z", **values})


def test_a_manifest_that_is_not_of_its_files_is_refused() -> None:
    hashes = {"model_index.json": ZEROS, "unet/config.json": "1" * 64}
    assert parse_manifest(manifest(hashes), "here").bytes == 8
    for wrong, said in (
        (manifest(hashes, version="2" * 64), "its version is not that of its files"),
        (manifest({"unet/config.json": ZEROS}), "names no model_index.json"),
        (manifest({"model_index.json": "x"}), "sha256"),
        (manifest(hashes, files=[{"path": "model_index.json", "bytes": -1, "sha256": ZEROS}]), "bytes"),
        ("[" * 100_000, "no manifest"),
        ("\xff", "no manifest"),
    ):
        with pytest.raises(ModelError, match=said):
            parse_manifest(wrong, "here")
