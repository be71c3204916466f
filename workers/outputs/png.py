"""Encodes a picture as a PNG with its settings as metadata."""

import io
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from farm.specs.spec import RenderSpec
from workers.render.request import Rendered

PARAMETERS = "parameters"
"""The text chunk that AUTOMATIC1111's web UI writes and galleries read."""
FARM = "diffusion-farm"
"""The text chunk with all metadata as JSON."""


@cache
def versions() -> Mapping[str, str]:
    """The versions of the packages that render."""
    found = {}
    for name in ("diffusion-farm", "torch", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def parameters(spec: RenderSpec, rendered: Rendered) -> str:
    """The settings in the format of AUTOMATIC1111's web UI: prompt, negative prompt, a line with the rest."""
    lines = [spec.prompt]
    if spec.negative_prompt:
        lines.append(f"Negative prompt: {spec.negative_prompt}")
    rest: dict[str, Any] = {
        "Steps": spec.num_inference_steps,
        "Sampler": spec.scheduler or rendered.scheduler,
        "CFG scale": f"{spec.guidance_scale:g}",
        "Seed": spec.seed,
        "Size": f"{rendered.width}x{rendered.height}",
        "Model hash": rendered.model_sha256[:10],
        "Model": spec.model,
        "Version": f"diffusion-farm {versions()['diffusion-farm']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in rest.items()))
    return "\n".join(lines)


def encode(spec: RenderSpec, rendered: Rendered, origin: Mapping[str, Any]) -> bytes:
    """The bytes of a PNG with the settings as text, and the spec, the model's hash and the versions as JSON.

    `origin` is added to the JSON: batch, job, attempt, worker.
    """
    everything = {
        "spec": spec.model_dump(mode="json"),
        "model_sha256": rendered.model_sha256,
        "scheduler": rendered.scheduler,
        "width": rendered.width,
        "height": rendered.height,
        "device": rendered.device,
        "dtype": rendered.dtype,
        "warnings": list(rendered.warnings),
        "versions": dict(versions()),
        **origin,
    }
    text = PngInfo()
    for key, value in ((PARAMETERS, parameters(spec, rendered)), (FARM, json.dumps(everything, ensure_ascii=False))):
        text.add_itxt(key, value)
    out = io.BytesIO()
    rendered.image.save(out, "PNG", pnginfo=text, compress_level=4)
    return out.getvalue()


def read(image: Image.Image) -> dict[str, Any]:
    """The JSON that `encode` wrote; raises KeyError for a picture without it."""
    found: dict[str, Any] = json.loads(image.info[FARM])
    return found
