"""Stable Diffusion 1.x and 2.x: CLIP text encoder, UNet predicting noise or v, VAE.

Latent diffusion (Rombach et al. 2022), as `diffusers.StableDiffusionPipeline` draws it.
"""

import diffusers
import torch

from farm.spec import RenderSpec
from workers.checkpoints import Checkpoint, Family
from workers.pipelines import Report
from workers.pipelines.shared import DiffusersPipeline, Embedding, load_pipe

FAMILY = Family("StableDiffusionPipeline", ("scheduler", "text_encoder", "tokenizer", "unet", "vae"))


class StableDiffusion(DiffusersPipeline):
    """A `Pipeline` over the parts of a `StableDiffusionPipeline`."""

    samplers = "diffusion"

    def embed(self, text: str, clip_skip: int | None, *, negative: bool) -> Embedding:
        """(1, 77, width): CLIP's last hidden state, or an earlier one."""
        positive, _ = self.pipe.encode_prompt(text, self.device, 1, False, clip_skip=clip_skip)
        return {"encoder_hidden_states": positive}

    def guidance(self, spec: RenderSpec) -> float:
        """None where it was distilled into the UNet (latent consistency models, Luo et al. 2023)."""
        return 1.0 if self.distilled else spec.guidance_scale

    def conditioned(self, embedding: Embedding, spec: RenderSpec) -> Embedding:
        """With the guidance scale as an input, where the UNet was distilled to take it."""
        if not self.distilled:
            return embedding
        scale = torch.tensor([spec.guidance_scale - 1])
        width = self.denoiser.config.time_cond_proj_dim
        return {**embedding, "timestep_cond": self.pipe.get_guidance_scale_embedding(scale, width).to(self.device, self.dtype)}

    @property
    def distilled(self) -> bool:
        """Whether the UNet takes the guidance scale as an input instead of a second row."""
        return self.denoiser.config.time_cond_proj_dim is not None

    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Embedding) -> torch.Tensor:
        """The UNet."""
        output: torch.Tensor = self.denoiser(latents, timesteps, **conditioning, return_dict=False)[0]
        return output


def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, report: Report) -> StableDiffusion:
    """Load a checked checkpoint onto the device. Raises `ModelError`, or `torch.OutOfMemoryError`."""
    return StableDiffusion(load_pipe(diffusers.StableDiffusionPipeline, checkpoint, device, dtype, report), checkpoint)
