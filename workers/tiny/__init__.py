"""What the small model that ships is, and where its weights lie.

A Stable Diffusion in miniature, trained by `python -m workers.tiny.train` on scenes the package draws itself.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""The checkpoint in diffusers' folder format: `StableDiffusionPipeline.from_pretrained(WEIGHTS)` loads it."""

__all__ = ["WEIGHTS"]
