"""The metadata of a PNG."""

import io
import json

from PIL import Image

from farm.specs.spec import RenderSpec
from workers.outputs import png
from workers.render.request import Rendered


def rendered() -> Rendered:
    return Rendered(
        image=Image.new("RGB", (64, 72), (200, 30, 30)),
        model="here",
        model_sha256="ab" * 32,
        width=64,
        height=72,
        steps=20,
        scheduler="EulerDiscreteScheduler",
        device="cpu",
        dtype="float32",
        render_seconds=1.0,
        warnings=("cut",),
    )


def test_a_png_carries_its_parameters_as_text_and_its_spec_as_json() -> None:
    spec = RenderSpec(prompt="a cät\nsitting", negative_prompt="blurry", seed=5, num_inference_steps=20, model="sd15")
    data = png.encode(spec, rendered(), {"job": "sea-x-1"})
    image = Image.open(io.BytesIO(data))
    assert image.text["parameters"] == (
        "a cät\nsitting\nNegative prompt: blurry\nSteps: 20, Sampler: EulerDiscreteScheduler, CFG scale: 5, Seed: 5, "
        f"Size: 64x72, Model hash: ababababab, Model: sd15, Version: diffusion-farm {png.versions()['diffusion-farm']}"
    )
    everything = png.read(image)
    assert RenderSpec.model_validate(everything["spec"]) == spec
    assert everything["model_sha256"] == "ab" * 32
    assert everything["job"] == "sea-x-1"
    assert set(everything["versions"]) == {"diffusion-farm", "torch", "diffusers", "transformers"}
    json.dumps(everything)
