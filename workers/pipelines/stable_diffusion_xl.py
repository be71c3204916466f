"""SDXL: two CLIP text encoders, a UNet with the picture's size as an input, VAE.

Podell et al. 2023, as `diffusers.StableDiffusionXLPipeline` draws it, without a refiner.
"""

from typing import Any

import torch

from farm.specs.spec import RenderSpec
from workers.models.checkpoints import Family
from workers.pipelines.stable_diffusion import StableDiffusion
from workers.pipelines.texts import Embedding, Text

FAMILY = Family(
    "StableDiffusionXLPipeline",
    ("scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "vae"),
)


class StableDiffusionXL(StableDiffusion):
    """A `Pipeline` over the parts of a `StableDiffusionXLPipeline`."""

    def amended(self, pipe: Any) -> Any:
        """Decode in float32 if the VAE overflows in float16, which makes pictures black."""
        if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.float()
        return pipe

    def embed(self, text: Text) -> Embedding:
        """(1, 77, both widths): the hidden states before the last; and the second encoder's pooled text, (1, width)."""
        clip_skip = None if text.negative else text.options.clip_skip
        states, _, pooled, _ = self.pipe.encode_prompt(
            text.text, device=self.device, do_classifier_free_guidance=False, clip_skip=clip_skip
        )
        if text.negative and not text.text and self.pipe.config.force_zeros_for_empty_prompt:
            states, pooled = torch.zeros_like(states), torch.zeros_like(pooled)
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    def conditioned(self, embedding: Embedding, spec: RenderSpec) -> Embedding:
        """With the sizes of the training picture, its crop and the picture to draw, all the same: (1, 6)."""
        width, height = self.size(spec)
        ids = self.pipe._get_add_time_ids(  # noqa: SLF001 - it checks the checkpoint's config, too
            (height, width), (0, 0), (height, width), self.dtype, self.pipe.text_encoder_2.config.projection_dim
        )
        return {**super().conditioned(embedding, spec), "time_ids": ids.to(self.device)}

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Embedding) -> torch.Tensor:
        """The UNet."""
        own = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        others = {name: part for name, part in conditioning.items() if name not in own}
        output: torch.Tensor = self.denoiser(latents, timesteps, **others, added_cond_kwargs=own, return_dict=False)[0]
        return output

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """By each channel's mean and deviation, if the VAE has them."""
        config = self.pipe.vae.config
        if config.latents_mean is None or config.latents_std is None:
            return super().unscaled(latents)
        mean = latents.new_tensor(config.latents_mean).view(1, -1, 1, 1)
        deviation = latents.new_tensor(config.latents_std).view(1, -1, 1, 1)
        return latents * deviation / float(config.scaling_factor) + mean


load = StableDiffusionXL
