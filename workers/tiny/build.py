"""Builds the parts of the tiny model, and writes them as a checkpoint folder.

The parts and their file format are those of Stable Diffusion 1 (Rombach et al. 2022, https://arxiv.org/abs/2112.10752):
a CLIP text encoder over 77 tokens, a UNet that predicts noise, and an autoencoder with a factor of eight. Only
the widths are smaller.
"""

from __future__ import annotations

import json
import random
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import diffusers
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from workers.tiny import scenes

TOKENS = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Widths:
    """The widths of the parts; the defaults are those of the model that ships."""

    vae: tuple[int, ...] = (32, 48, 64, 64)
    unet: tuple[int, int] = (128, 128)
    text: int = 128
    text_layers: int = 2


def build_vae(widths: Widths) -> diffusers.AutoencoderKL:
    """An untrained autoencoder: pictures `(n, 3, 64, 64)` in -1..1 to latents `(n, 4, 8, 8)` and back."""
    count = len(widths.vae)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * count,
        up_block_types=("UpDecoderBlock2D",) * count,
        block_out_channels=widths.vae,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=scenes.SIDE,
        mid_block_add_attention=False,
    )


def build_unet(widths: Widths) -> diffusers.UNet2DConditionModel:
    """An untrained denoiser of latents `(n, 4, 8, 8)`, conditioned on 77 vectors of the text encoder's width.

    It has cross-attention at 8x8 and in its middle, where a figure covers one latent pixel or a few;
    `attention_head_dim` is the number of heads, as in Stable Diffusion 1
    (https://github.com/huggingface/diffusers/issues/2011).
    """
    return diffusers.UNet2DConditionModel(
        sample_size=scenes.SIDE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=widths.unet,
        layers_per_block=1,
        cross_attention_dim=widths.text,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(widths: Widths, tokenizer: transformers.CLIPTokenizer) -> transformers.CLIPTextModel:
    """An untrained text encoder: token ids `(n, 77)` to vectors `(n, 77, width)`."""
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=widths.text,
            intermediate_size=4 * widths.text,
            projection_dim=widths.text,
            num_hidden_layers=widths.text_layers,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_tokenizer(captions: int = 5000) -> transformers.CLIPTokenizer:
    """CLIP's byte-level tokenizer with the word pieces of `captions` captions of the training set.

    Every byte is a token, alone and at a word's end, so any text can be tokenised.
    """
    rng = random.Random("tokenizer")
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(vocab_size=1000, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator((scenes.caption(scenes.random_scene(rng), rng) for _ in range(captions)), trainer)
    merges = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges), _START, _END]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def build_noise_scheduler() -> diffusers.DDIMScheduler:
    """Stable Diffusion 1's noise schedule: 1000 steps of scaled-linear betas; the model predicts the noise."""
    return diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save(
    folder: Path,
    tokenizer: transformers.CLIPTokenizer,
    text_encoder: transformers.CLIPTextModel,
    unet: diffusers.UNet2DConditionModel,
    vae: diffusers.AutoencoderKL,
    noise_scheduler: diffusers.DDIMScheduler,
) -> float:
    """Write the checkpoint in diffusers' folder format with float16 weights; returns its size in megabytes."""
    parts = [deepcopy(part).half().eval() for part in (text_encoder, unet, vae)]
    pipeline = diffusers.StableDiffusionPipeline(
        vae=parts[2],
        text_encoder=parts[0],
        tokenizer=tokenizer,
        unet=parts[1],
        scheduler=noise_scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
