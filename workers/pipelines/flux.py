"""Flux: CLIP's pooled text and T5, a transformer over packed latents that predicts a flow, VAE of 16 channels.

FLUX.1 (Black Forest Labs 2024), as `diffusers.FluxPipeline` draws it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from farm.specs.guidance import Guidance
from farm.specs.spec import RenderSpec
from workers.models.checkpoints import Family
from workers.pipelines.shared import DiffusersPipeline
from workers.pipelines.texts import Embedding, Text
from workers.render.request import RenderRequest

FAMILY = Family(
    "FluxPipeline", ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer", "vae")
)


class Flux(DiffusersPipeline):
    """A `Pipeline` over the parts of a `FluxPipeline`.

    Latents stay packed, as the transformer takes them: (height / 16, width / 16, 64), each 2x2 latent pixels.
    """

    samplers = "flow"
    text_options = frozenset({"clip_skip", "max_sequence_length"})

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels; the transformer's config has none."""
        size = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return size, size

    @property
    def multiple(self) -> int:
        """Two latent pixels."""
        return super().multiple * 2

    def shape(self, width: int, height: int) -> tuple[int, ...]:
        """(height, width, channels) of packed latents."""
        return (height // self.multiple, width // self.multiple, self.denoiser.config.in_channels)

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """Drawn as latents, then packed."""
        rows, columns, channels = shape
        noise = super().noise((channels // 4, 2 * rows, 2 * columns), generator)
        packed: torch.Tensor = self.pipe._pack_latents(noise, *noise.shape)  # noqa: SLF001
        return packed.view(1, *shape)

    def encode(self, request: RenderRequest) -> None:
        """Also warn about fields that have no effect."""
        super().encode(request)
        if request.spec.negative_prompt and request.rows == 1:
            request.warnings.append("the negative prompt has no effect: Flux needs a true_cfg_scale above 1 for it")
        if request.spec.true_cfg_scale > 1 and request.rows == 1:
            request.warnings.append("true_cfg_scale has no effect without a negative prompt")
        if request.spec.clip_skip:
            request.warnings.append("clip_skip has no effect: Flux takes nothing but CLIP's pooled text")

    def embed(self, text: Text) -> Embedding:
        """T5's last hidden state, (1, tokens, width), and CLIP's pooled text, (1, width)."""
        tokens = self.token_limits(text.options)["tokenizer_2"]
        states, pooled, _ = self.pipe.encode_prompt(text.text, device=self.device, max_sequence_length=tokens)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def token_limits(self, options: RenderSpec) -> Mapping[str, int]:
        """T5's."""
        return {"tokenizer_2": options.max_sequence_length or 512}

    @property
    def guidance(self) -> Guidance:
        """By `true_cfg_scale`, against a negative prompt; `guidance_scale` is only an input of the transformer."""
        return Guidance("true_cfg_scale", requires="negative_prompt")

    def conditioned(self, embedding: Embedding, spec: RenderSpec) -> Embedding:
        """With the guidance scale as an input, if it was distilled into the transformer."""
        if not self.denoiser.config.guidance_embeds:
            return embedding
        return {**embedding, "guidance": torch.tensor([spec.guidance_scale], device=self.device)}

    def timestep_kwargs(self, scheduler: Any, steps: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """Evenly spaced sigmas, and `mu`, which keeps larger pictures longer at high noise."""
        mu = self.mu(scheduler, shape[0] * shape[1], 1.15)
        if scheduler.config.get("use_flow_sigmas"):
            return {"mu": mu}
        return {"mu": mu, "sigmas": np.linspace(1.0, 1 / steps, steps)}

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Embedding) -> torch.Tensor:
        """The transformer, with the position of each token in picture and text."""
        height, width = latents.shape[1:3]
        tokens = conditioning["encoder_hidden_states"].shape[1]
        rows, columns = (torch.arange(size, device=self.device, dtype=self.dtype) for size in (height, width))
        grid = torch.cartesian_prod(rows, columns)
        output: torch.Tensor = self.denoiser(
            latents.flatten(1, 2),
            timestep=timesteps.to(self.dtype) / 1000,
            img_ids=torch.cat([torch.zeros_like(grid[:, :1]), grid], 1),
            txt_ids=grid.new_zeros(tokens, 3),
            **conditioning,
            return_dict=False,
        )[0]
        return output.view_as(latents)

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Also unpacked."""
        height, width = (size * self.multiple for size in latents.shape[1:3])
        packed, factor = latents.flatten(1, 2), self.pipe.vae_scale_factor
        return super().unscaled(self.pipe._unpack_latents(packed, height, width, factor))  # noqa: SLF001


load = Flux
