"""Stable Diffusion 1.x and 2.x: CLIP text encoder, UNet predicting noise or v, VAE.

Latent diffusion (Rombach et al. 2022), as `diffusers.StableDiffusionPipeline` draws it.
"""

import torch

from farm.specs.guidance import UNGUIDED, Guidance
from farm.specs.spec import RenderSpec
from workers.models.checkpoints import Family
from workers.pipelines.shared import DiffusersPipeline
from workers.pipelines.texts import Embedding, Text

FAMILY = Family("StableDiffusionPipeline", ("scheduler", "text_encoder", "tokenizer", "unet", "vae"))


class StableDiffusion(DiffusersPipeline):
    """A `Pipeline` over the parts of a `StableDiffusionPipeline`."""

    samplers = "diffusion"
    text_options = frozenset({"clip_skip"})

    def embed(self, text: Text) -> Embedding:
        """(1, 77, width): CLIP's last hidden state; of a prompt with `clip_skip` an earlier one."""
        clip_skip = text.options.clip_skip
        if clip_skip is None or text.negative:
            return {"encoder_hidden_states": self.pipe.encode_prompt(text.text, self.device, 1, False)[0]}
        # diffusers 0.42 looks for the final norm where transformers 4 had it, and raises.
        encoder, tokenizer = self.pipe.text_encoder, self.pipe.tokenizer
        limit = tokenizer.model_max_length
        tokens = tokenizer(text.text, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        masked = getattr(encoder.config, "use_attention_mask", False)
        states = encoder(
            tokens.input_ids.to(self.device),
            attention_mask=tokens.attention_mask.to(self.device) if masked else None,
            output_hidden_states=True,
        ).hidden_states
        return {"encoder_hidden_states": encoder.final_layer_norm(states[-(clip_skip + 1)])}

    @property
    def guidance(self) -> Guidance:
        """Never if guidance was distilled into the UNet (latent consistency models, Luo et al. 2023)."""
        return super().guidance if self.denoiser.config.time_cond_proj_dim is None else UNGUIDED

    def conditioned(self, embedding: Embedding, spec: RenderSpec) -> Embedding:
        """With the guidance scale as an input, if it was distilled into the UNet."""
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
