"""Stable Diffusion 3 and 3.5: two CLIPs and T5, a transformer that predicts a flow, VAE of 16 channels.

Esser et al. 2024, as `diffusers.StableDiffusion3Pipeline` draws it. T5 may be left out, to save 9 GB.
"""

from collections.abc import Mapping
from typing import Any

import torch

from farm.errors import BadRequest
from farm.specs.spec import RenderSpec
from workers.models.checkpoints import Family
from workers.pipelines.shared import DiffusersPipeline
from workers.pipelines.texts import Embedding, Text

FAMILY = Family(
    "StableDiffusion3Pipeline",
    (
        *("scheduler", "text_encoder", "text_encoder_2", "text_encoder_3"),
        *("tokenizer", "tokenizer_2", "tokenizer_3", "transformer", "vae"),
    ),
    optional=("text_encoder_3", "tokenizer_3"),
)


class StableDiffusion3(DiffusersPipeline):
    """A `Pipeline` over the parts of a `StableDiffusion3Pipeline`."""

    samplers = "flow"
    text_options = frozenset({"clip_skip", "max_sequence_length"})

    def amended(self, pipe: Any) -> Any:
        """Name the repeated blocks of the transformer, which diffusers omits."""
        pipe.transformer._repeated_blocks = ["JointTransformerBlock"]  # noqa: SLF001
        return pipe

    @property
    def multiple(self) -> int:
        """A patch of latent pixels."""
        return super().multiple * int(self.denoiser.config.patch_size)

    def size(self, spec: RenderSpec) -> tuple[int, int]:
        """(width, height) of a spec in pixels; the number of patches with a position limits each side."""
        width, height = super().size(spec)
        most = self.denoiser.config.pos_embed_max_size * self.multiple
        if max(width, height) > most:
            raise BadRequest(f"{self.name} draws up to {most} pixels a side, not {width}x{height}")
        return width, height

    def embed(self, text: Text) -> Embedding:
        """(1, tokens, width): both CLIPs side by side, then T5 or zeros; and both pooled texts, (1, both widths)."""
        states, _, pooled, _ = self.pipe.encode_prompt(
            text.text,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            clip_skip=None if text.negative else text.options.clip_skip,
            max_sequence_length=self.token_limits(text.options)["tokenizer_3"],
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def token_limits(self, options: RenderSpec) -> Mapping[str, int]:
        """T5's."""
        return {"tokenizer_3": options.max_sequence_length or 256}

    def timestep_kwargs(self, scheduler: Any, steps: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """`mu`, which keeps larger pictures longer at high noise, if the checkpoint shifts its timesteps."""
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        return {"mu": self.mu(scheduler, shape[1] * shape[2] // self.denoiser.config.patch_size**2, 1.16)}

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Embedding) -> torch.Tensor:
        """The transformer."""
        output: torch.Tensor = self.denoiser(latents, timestep=timesteps, **conditioning, return_dict=False)[0]
        return output


load = StableDiffusion3
