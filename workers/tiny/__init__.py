"""The small model that ships with the package: a Stable Diffusion in miniature.

`python -m workers.tiny.train` trains it on scenes that this package draws.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The checkpoint in diffusers' folder format: `StableDiffusionPipeline.from_pretrained(WEIGHTS)` loads it."""

__all__ = ["WEIGHTS"]
