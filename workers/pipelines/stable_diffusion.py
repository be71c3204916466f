"""Stable Diffusion 1.x and 2.x: CLIP text encoder, UNet predicting noise or v, VAE.

Latent diffusion (Rombach et al. 2022), as `diffusers.StableDiffusionPipeline` draws it.
"""

import torch

from farm.specs.spec import RenderSpec
from workers.models.checkpoints import Family
from workers.pipelines.shared import DiffusersPipeline
from workers.pipelines.texts import Embedding

FAMILY = Family("StableDiffusionPipeline", ("scheduler", "text_encoder", "tokenizer", "unet", "vae"))


class StableDiffusion(DiffusersPipeline):
    """A `Pipeline` over the parts of a `StableDiffusionPipeline`."""

    samplers = "diffusion"

    def embed(self, text: str, clip_skip: int | None, *, negative: bool) -> Embedding:
        """(1, 77, width): CLIP's last hidden state, or an earlier one."""
        if clip_skip is None:
            return {"encoder_hidden_states": self.pipe.encode_prompt(text, self.device, 1, False)[0]}
        # diffusers 0.42 looks for the norm where transformers 4 had it, and raises.
        encoder, tokenizer = self.pipe.text_encoder, self.pipe.tokenizer
        limit = tokenizer.model_max_length
        tokens = tokenizer(text, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        masked = getattr(encoder.config, "use_attention_mask", False)
        states = encoder(
            tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device) if masked else None,
            output_hidden_states=True,
        ).hidden_states
        return {"encoder_hidden_states": encoder.final_layer_norm(states[-(clip_skip + 1)])}

    def guidance(self, spec: RenderSpec) -> float:
        """None where it was distilled into the UNet (latent consistency models, Luo et al. 2023)."""
        return spec.guidance_scale if self.denoiser.config.time_cond_proj_dim is None else 1.0

    def conditioned(self, embedding: Embedding, spec: RenderSpec) -> Embedding:
        """With the guidance scale as an input, where the UNet was distilled to take it."""
        width = self.denoiser.config.time_cond_proj_dim
        if width is None:
            return embedding
        scale = self.pipe.get_guidance_scale_embedding(torch.tensor([spec.guidance_scale - 1]), width)
        return {**embedding, "timestep_cond": scale.to(self.device, self.dtype)}

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Embedding) -> torch.Tensor:
        """The UNet."""
        output: torch.Tensor = self.denoiser(latents, timesteps, **conditioning, return_dict=False)[0]
        return output


load = StableDiffusion
