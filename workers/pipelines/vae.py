"""Decodes latents into pictures, in slices or tiles if memory is short."""

import logging
from typing import Any

import torch
from torch.nn import functional as nn

log = logging.getLogger(__name__)

DECODED_PIXELS = 4 * 1024 * 1024
"""How many pixels are decoded at once; a single picture that is larger is decoded in tiles."""
PREVIEW_SIZE = 32
"""The longer side of a preview, in latent pixels of 8 by 8."""


def decode(vae: Any, latents: torch.Tensor, factor: int) -> torch.Tensor:
    """Decode unscaled latents, (n, channels, height, width), into pictures: float32 in [0, 1], `factor` times the size.

    Raises `torch.OutOfMemoryError` if several do not fit at once; a single picture is first retried in tiles.
    """
    latents = latents.to(vae.dtype)
    width, height = latents.shape[-1] * factor, latents.shape[-2] * factor
    pictures = []
    for slice_ in torch.split(latents, max(1, DECODED_PIXELS // (width * height))):
        whole = vae.tiled_decode if width * height > DECODED_PIXELS else vae.decode
        try:
            decoded = whole(slice_, return_dict=False)[0]
        except torch.OutOfMemoryError:
            if len(slice_) > 1:
                raise
            log.warning("a picture of %dx%d does not fit the VAE whole: decoding it in tiles", width, height)
            decoded = vae.tiled_decode(slice_, return_dict=False)[0]
        pictures.append((decoded.float() / 2 + 0.5).clamp(0, 1))
    return torch.cat(pictures)


def shrunk(latents: torch.Tensor) -> torch.Tensor:
    """Shrink latents to at most `PREVIEW_SIZE` in width and height, so that decoding them is cheap."""
    longest = max(latents.shape[-2:])
    return (
        nn.interpolate(latents, scale_factor=PREVIEW_SIZE / longest, mode="area") if longest > PREVIEW_SIZE else latents
    )
