"""Trains the image decoder, and the encoder that training needs.

Training uses pictures only. The loss includes edges as well as colours, because the scenes consist of flat areas and
sharp edges. The latents get a little noise before they are decoded, so that the denoiser's small errors do not show.
"""

from __future__ import annotations

import random

import diffusers
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.tiny import scenes
from workers.tiny.fit import Loss

LATENT_NOISE = 0.07
KL_WEIGHT = 5e-4
EDGE_WEIGHT = 0.5


def to_tensor(pictures: npt.NDArray[np.uint8]) -> Tensor:
    """Pixels `(n, h, w, 3)`, 0 to 255, as `(n, 3, h, w)` float32 in -1..1."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def draw_many(count: int, seed: int) -> tuple[list[scenes.Scene], npt.NDArray[np.uint8]]:
    """`count` scenes of the training set and their pictures, `(count, 64, 64, 3)`."""
    rng = random.Random(f"scenes {seed}")
    found = [scenes.random_scene(rng) for _ in range(count)]
    return found, np.stack([scenes.draw(scene, rng) for scene in found])


def autoencoder_loss(vae: diffusers.AutoencoderKL, pictures: npt.NDArray[np.uint8], batch: int) -> Loss:
    """A loss of the difference between pictures and their reconstructions, plus a light KL term."""

    def loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(pictures), (batch,), generator=generator)
        true = to_tensor(pictures[picked.numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            moments = vae.quant_conv(vae.encoder(true))
        mean, log_variance = moments.float().clamp(-20, 20).chunk(2, dim=1)
        spread = (0.5 * log_variance).exp().clamp(min=LATENT_NOISE)
        latents = mean + spread * torch.randn(mean.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            drawn = vae.decode(latents).sample
        distance, figures = picture_distance(drawn.float(), true)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return distance + KL_WEIGHT * kl, figures | {"kl": kl.item()}

    return loss


class Decoder(nn.Module):
    """The half of the autoencoder that rendering uses: latents `(n, 4, 8, 8)`, not scaled, to pictures in -1..1."""

    def __init__(self, vae: diffusers.AutoencoderKL) -> None:
        super().__init__()
        self.post_quant_conv = vae.post_quant_conv
        self.decoder = vae.decoder

    def forward(self, latents: Tensor) -> Tensor:
        """Decode."""
        drawn: Tensor = self.decoder(self.post_quant_conv(latents))
        return drawn


def decoder_loss(decoder: Decoder, pictures: npt.NDArray[np.uint8], latents: Tensor, batch: int) -> Loss:
    """A loss of the difference between pictures and the decodings of their fixed latents."""

    def loss(generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        picked = torch.randint(len(pictures), (batch,), generator=generator)
        true, told = to_tensor(pictures[picked.numpy()]), latents[picked]
        with torch.autocast("cpu", torch.bfloat16):
            drawn = decoder(told + LATENT_NOISE * torch.randn(told.shape, generator=generator))
        return picture_distance(drawn.float(), true)

    return loss


def picture_distance(drawn: Tensor, true: Tensor) -> tuple[Tensor, dict[str, float]]:
    """L1 and squared error of pixels, and L1 of their differences to the right and down."""
    error = drawn - true
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    absolute, squared = error.abs().mean(), error.square().mean()
    return absolute + squared + EDGE_WEIGHT * edges, {"mse": squared.item(), "l1": absolute.item()}


@torch.no_grad()
def normalise(vae: diffusers.AutoencoderKL, pictures: npt.NDArray[np.uint8]) -> None:
    """Give each latent channel mean 0 and standard deviation 1 over `pictures`, without changing the decoded pictures.

    Both are folded into the 1x1 convolutions before and after the latents, because the file format has one
    `scaling_factor` for all channels and no shift.
    """
    latents = encode(vae, pictures)
    mean, spread = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    before.weight[:4] /= spread[:, None, None, None]
    before.bias[:4] = (before.bias[:4] - mean) / spread
    before.bias[4:] -= 2 * spread.log()
    after.bias += (after.weight[:, :, 0, 0] * mean).sum(dim=1)
    after.weight *= spread[None, :, None, None]


@torch.no_grad()
def encode(vae: diffusers.AutoencoderKL, pictures: npt.NDArray[np.uint8], batch: int = 64) -> Tensor:
    """The modes of pictures' latents, `(n, 4, 8, 8)`, unscaled."""
    return torch.cat(
        [
            vae.encode(to_tensor(part)).latent_dist.mode()
            for part in np.array_split(pictures, -(-len(pictures) // batch))
        ]
    )


@torch.no_grad()
def reconstruction_error(vae: diffusers.AutoencoderKL, pictures: npt.NDArray[np.uint8], batch: int = 64) -> float:
    """The mean squared error of reconstructed pictures, in units of -1..1."""
    total = 0.0
    for part in np.array_split(pictures, -(-len(pictures) // batch)):
        drawn = vae.decode(encode(vae, part)).sample
        total += functional.mse_loss(drawn, to_tensor(part), reduction="sum").item()
    return total / pictures.size
