"""A finished picture as a PNG that says how it was made."""

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
"""The text chunk that AUTOMATIC1111's web UI writes and that galleries read."""
FARM = "diffusion-farm"
"""The text chunk with everything, as JSON."""


@cache
def versions() -> Mapping[str, str]:
    """The versions of what draws."""
    found = {}
    for name in ("diffusion-farm", "torch", "diffusers", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def parameters(spec: RenderSpec, rendered: Rendered) -> str:
    """The settings in the form of AUTOMATIC1111's web UI: prompt, negative prompt, one line of the rest."""
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
    """A PNG with the settings as people read them and, as JSON, the spec, the model's hash and the versions.

    `origin` says where it comes from: batch, job, attempt, worker.
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
    """What `encode` wrote as JSON; raises KeyError if the picture is not from a farm."""
    found: dict[str, Any] = json.loads(image.info[FARM])
    return found
