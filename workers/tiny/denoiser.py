"""Trains the UNet and the text encoder to predict noise.

Both are trained together on precomputed latents: a known amount of noise is added to a picture's latents; the UNet gets
the sum, the amount and the caption's 77 vectors, and predicts the noise (Ho et al. 2020,
https://arxiv.org/abs/2006.11239).
"""

from __future__ import annotations

import random

import diffusers
import torch
import transformers
from torch import Tensor, nn

from workers.tiny import scenes
from workers.tiny.fit import Loss

DROPPED_CAPTIONS = 0.1
"""The share of captions replaced by the empty one, for classifier-free guidance (https://arxiv.org/abs/2207.12598)."""

SNR_CAP = 5.0
"""Latents with a higher signal-to-noise ratio than this get a lower weight (Hang et al. 2023, https://arxiv.org/abs/2303.09556)."""


class Denoiser(nn.Module):
    """The UNet and the text encoder, trained together.

    Attention is not fused: at this size on a CPU, the backward pass of torch's fused attention takes several times as
    long, and a whole training step half as long again.
    """

    def __init__(self, text_encoder: transformers.CLIPTextModel, unet: diffusers.UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet
        text_encoder.set_attn_implementation("eager")
        unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Latents `(n, 4, h, w)` with noise added.

    At timestep `t` a share `1 - alphas_cumprod[t]` of the variance is noise; the same as diffusers' `add_noise`.
    """
    kept = alphas_cumprod[timesteps][:, None, None, None]
    return kept.sqrt() * latents + (1 - kept).sqrt() * noise


def denoiser_loss(
    denoiser: Denoiser,
    tokenizer: transformers.CLIPTokenizer,
    noise_scheduler: diffusers.DDIMScheduler,
    drawn: list[scenes.Scene],
    latents: Tensor,
    batch: int,
) -> Loss:
    """The squared error of the predicted noise; each use of a scene gets another wording."""
    alphas_cumprod: Tensor = noise_scheduler.alphas_cumprod

    def loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(drawn), (batch,), generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        captions = ["" if rng.random() < DROPPED_CAPTIONS else scenes.caption(drawn[i], rng) for i in picked.tolist()]
        true = latents[picked]
        noise = torch.randn(true.shape, generator=generator)
        # One timestep from each of `batch` equal ranges, so that every batch has all amounts of noise.
        timesteps = (
            (torch.arange(batch) + torch.rand(batch, generator=generator)) * (len(alphas_cumprod) / batch)
        ).long()
        noisy = add_noise(true, noise, timesteps, alphas_cumprod)
        with torch.autocast("cpu", torch.bfloat16):
            told = denoiser.text_encoder(token_ids(tokenizer, captions)).last_hidden_state
            predicted = denoiser.unet(noisy, timesteps, told).sample
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
        ratio = alphas_cumprod[timesteps] / (1 - alphas_cumprod[timesteps])
        return (error * (SNR_CAP / ratio).clamp(max=1)).mean(), {"noise mse": error.mean().item()}

    return loss


@torch.no_grad()
def noise_error(
    denoiser: Denoiser,
    tokenizer: transformers.CLIPTokenizer,
    noise_scheduler: diffusers.DDIMScheduler,
    drawn: list[scenes.Scene],
    latents: Tensor,
) -> float:
    """The mean squared error of the predicted noise, over all amounts of noise equally, in float32."""
    generator = torch.Generator().manual_seed(0)
    rng = random.Random(0)
    total = 0.0
    for start in range(0, len(drawn), 64):
        part = torch.arange(start, min(start + 64, len(drawn)))
        noise = torch.randn(latents[part].shape, generator=generator)
        timesteps = torch.randint(len(noise_scheduler.alphas_cumprod), (len(part),), generator=generator)
        noisy = add_noise(latents[part], noise, timesteps, noise_scheduler.alphas_cumprod)
        captions = [scenes.caption(drawn[i], rng) for i in part.tolist()]
        told = denoiser.text_encoder(token_ids(tokenizer, captions)).last_hidden_state
        total += (denoiser.unet(noisy, timesteps, told).sample - noise).square().mean(dim=(1, 2, 3)).sum().item()
    return total / len(drawn)


def token_ids(tokenizer: transformers.CLIPTokenizer, captions: list[str]) -> Tensor:
    """Captions as the pipeline tokenises them, `(n, 77)`."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
    return ids
