"""The checkpoint to measure: the model that ships, a folder, or a published architecture with random weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

from workers import tiny

RANDOM = ("sd15-random", "sdxl-random")
_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_CROSS, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


def find(model: str, folder: Path, device: str, dtype: str) -> Path:
    """The folder of a checkpoint; `sd15-random` and `sdxl-random` are written into `folder`.

    `sd15-random:10` has a tenth of the widths, to try the command on a small machine.
    """
    if model == "tiny":
        return tiny.WEIGHTS
    name, _, narrow = model.partition(":")
    if name not in RANDOM:
        return Path(model).expanduser()
    build = _sd15 if name == "sd15-random" else _sdxl
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):  # drawing billions of random numbers on the CPU is slow
            pipe = build(int(narrow or 1))
    finally:
        torch.set_default_dtype(torch.float32)
    pipe.save_pretrained(folder)
    return folder


def native_side(folder: Path) -> int:
    """The pixels of a checkpoint's native width."""
    unet, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("unet", "vae"))
    return int(unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1))


def _sd15(narrow: int) -> "diffusers.StableDiffusionPipeline":
    """The sizes of stable-diffusion-v1-5."""
    tokenizer = _tokenizer()
    text_width = _width(768, narrow)
    return diffusers.StableDiffusionPipeline(
        vae=_vae(narrow, 0.18215, 512),
        text_encoder=transformers.CLIPTextModel(_text(tokenizer, text_width, 12, "quick_gelu")),
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(
            sample_size=64,
            block_out_channels=tuple(_width(width, narrow) for width in (320, 640, 1280, 1280)),
            down_block_types=(_CROSS, _CROSS, _CROSS, "DownBlock2D"),
            up_block_types=("UpBlock2D", _CROSS_UP, _CROSS_UP, _CROSS_UP),
            cross_attention_dim=text_width,
            attention_head_dim=8,
        ),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(narrow: int) -> "diffusers.StableDiffusionXLPipeline":
    """The sizes of stable-diffusion-xl-base-1.0."""
    tokenizer, tokenizer_2 = _tokenizer(), _tokenizer(pad_token="!")
    widths = tuple(_width(width, narrow) for width in (320, 640, 1280))
    first, second = _width(768, narrow), _width(1280, narrow)
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(narrow, 0.13025, 1024),
        text_encoder=transformers.CLIPTextModel(_text(tokenizer, first, 12, "quick_gelu")),
        text_encoder_2=transformers.CLIPTextModelWithProjection(
            _text(tokenizer_2, second, 32, "gelu", projection_dim=second)
        ),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=diffusers.UNet2DConditionModel(
            sample_size=128,
            block_out_channels=widths,
            down_block_types=("DownBlock2D", _CROSS, _CROSS),
            up_block_types=(_CROSS_UP, _CROSS_UP, "UpBlock2D"),
            attention_head_dim=tuple(max(1, width // 64) for width in widths),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=first + second,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=second + 6 * 256,
        ),
        scheduler=_scheduler(),
    )


def _width(width: int, narrow: int) -> int:
    """A multiple of 32, the number of groups of a UNet's norms."""
    return max(1, round(width / narrow / 32)) * 32


def _vae(narrow: int, scaling_factor: float, side: int) -> "diffusers.AutoencoderKL":
    return diffusers.AutoencoderKL(
        sample_size=side,
        scaling_factor=scaling_factor,
        layers_per_block=2,
        block_out_channels=tuple(_width(width, narrow) for width in (128, 256, 512, 512)),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        # Random weights do not overflow, and both sides should decode in the given precision.
        force_upcast=False,
    )


def _scheduler() -> "diffusers.DDIMScheduler":
    return diffusers.DDIMScheduler(**_NOISE, clip_sample=False, set_alpha_to_one=False)


def _tokenizer(**tokens: str) -> "transformers.CLIPTokenizer":
    """CLIP's byte-level tokenizer without merges: one token per character, 77 per text."""
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, **tokens)


def _text(
    tokenizer: "transformers.CLIPTokenizer", width: int, layers: int, hidden_act: str, **more: Any
) -> "transformers.CLIPTextConfig":
    settings: Mapping[str, Any] = {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": 77,
        "hidden_act": hidden_act,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "projection_dim": width,
    }
    return transformers.CLIPTextConfig(**{**settings, **more})
