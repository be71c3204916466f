"""Model entries written by workers of this release and the previous one, as each release reads them."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from farm.jobs.served_models import DeviceMemory, MemoryLimit, ServedModel, device_memory, served_columns, served_models
from farm.specs.guidance import UNGUIDED, Guidance
from farm.specs.spec import RenderSpec

GUIDED = Guidance("guidance_scale")
FLUX = Guidance("true_cfg_scale", requires="negative_prompt")
LOADED = ServedModel("sd15", True, "e" * 64, 1000, "StableDiffusionPipeline", "diffusion", GUIDED)
MEMORY = DeviceMemory(20, 80)
OLD_ENTRY = {
    "name": "sd15",
    "most_row_pixels": 2 * 512 * 512,
    "own_rows": 2,
    "sha256": "e" * 64,
    "bytes": 1000,
    "family": "StableDiffusionPipeline",
    "samplers": "diffusion",
    "held": True,
    "memory": [20, 80],
}
"""An entry as release 90b196f writes it."""


def fits_by_the_old_rule(entry: dict[str, Any], spec: RenderSpec) -> bool:
    """Return whether release 90b196f sends a job to the worker that wrote this entry."""
    rows = 2 if spec.guidance_scale > 1 or spec.true_cfg_scale > 1 else 1
    if spec.width is None or spec.height is None:
        return rows <= int(entry["own_rows"])
    return spec.width * spec.height * rows <= int(entry["most_row_pixels"])


@pytest.mark.parametrize("limit", [None, MemoryLimit(512 * 512, 1, GUIDED)])
@pytest.mark.parametrize("memory", [None, MEMORY])
def test_what_is_written_is_read_again(limit: MemoryLimit | None, memory: DeviceMemory | None) -> None:
    models = (ServedModel("bare"), replace(LOADED, limit=limit))
    row = served_columns(models, memory)
    assert served_models(row["models"]) == models
    assert device_memory(row["memory_used"], row["memory_total"], row["models"]) == memory


def test_the_entries_of_the_release_before_are_read() -> None:
    (model,) = served_models([OLD_ENTRY])
    assert model == replace(LOADED, guidance=None, limit=MemoryLimit(2 * 512 * 512, 2, GUIDED))
    assert device_memory(None, None, [OLD_ENTRY]) == MEMORY
    assert served_models([{"name": "sd15"}]) == (ServedModel("sd15"),)


def test_the_release_before_reads_the_entries_of_this_one() -> None:
    model = replace(LOADED, limit=MemoryLimit(2 * 512 * 512, 2, GUIDED))
    (entry,) = served_columns([model], MEMORY)["models"]
    assert {name: entry[name] for name in OLD_ENTRY} == OLD_ENTRY


@pytest.mark.parametrize("guidance", [GUIDED, FLUX, UNGUIDED])
@pytest.mark.parametrize("native_factor", [0, 1, 2])
def test_the_release_before_holds_back_no_picture_that_fits(guidance: Guidance, native_factor: int) -> None:
    limit = MemoryLimit(512 * 512, native_factor, guidance)
    (entry,) = served_columns([ServedModel("m", guidance=guidance, limit=limit)], None)["models"]
    true_cfgs = (1.0, 4.0) if guidance != GUIDED else (1.0,)  # no family supports both
    for size, scale, true_cfg in product((None, 256, 360, 512, 768), (1.0, 5.0), true_cfgs):
        fields = {"width": size, "height": size, "guidance_scale": scale, "true_cfg_scale": true_cfg}
        spec = RenderSpec.parse({"prompt": "a", "negative_prompt": "b", **fields})
        assert fits_by_the_old_rule(entry, spec) or not limit.allows(spec), spec


def test_keys_of_a_later_release_are_ignored() -> None:
    model = replace(LOADED, limit=MemoryLimit(512 * 512, 1, FLUX))
    (entry,) = served_columns([model], None)["models"]
    entry["guidance"]["added"] = entry["limit"]["added"] = entry["added"] = 1
    assert served_models([entry]) == (model,)


def test_where_one_side_of_a_picture_is_given_the_limit_allows_it() -> None:
    assert MemoryLimit(64, 0, GUIDED).allows(RenderSpec(prompt="a", width=64))
