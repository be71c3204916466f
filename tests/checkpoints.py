"""Complete checkpoints of each model family, made offline: a few hundred kilobytes with random weights.

They have the parts, config peculiarities and noise schedulers of the published checkpoints, in narrow layers. Their
64x64 pictures show nothing, but depend on every input.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

_WIDTH = 32
"""The width of a text encoder's vectors, and of CLIP's projected vector."""
_LATENT_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_NO_QUANT_CONVS = {"use_quant_conv": False, "use_post_quant_conv": False}


def build_checkpoint(folder: Path, **scheduler: Any) -> Path:
    """Write a Stable Diffusion 1.x that renders 64x64 pictures from 4x8x8 latents, with reproducible bytes.

    `scheduler` sets values in its PNDM config, such as `prediction_type`. Returns `folder`.
    """
    with _random_weights():
        tokenizer = _tokenizer()
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        pipe = diffusers.StableDiffusionPipeline(
            vae=_vae(latent_channels=4),
            text_encoder=transformers.CLIPTextModel(_clip(tokenizer, num_hidden_layers=2)),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=diffusers.PNDMScheduler(**_LATENT_DIFFUSION, skip_prk_steps=True, set_alpha_to_one=False),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    # PNDM has no clip_sample, yet the configs of SD contain it, and DDIM would clip without it.
    return _save(pipe, folder, {"clip_sample": False, **scheduler})


def build_sdxl(folder: Path, **scheduler: Any) -> Path:
    """Write an SDXL base that renders 64x64 pictures from 4x8x8 latents, with reproducible bytes.

    `scheduler` sets values in its Euler config. Returns `folder`.
    """
    with _random_weights():
        tokenizer, tokenizer_2 = _tokenizer(), _tokenizer(pad_token="!")
        unet = diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=2 * _WIDTH,
            attention_head_dim=2,
            use_linear_projection=True,
            norm_num_groups=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=_WIDTH + 6 * 8,  # the pooled text; two sizes and a corner
        )
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=_vae(latent_channels=4, scaling_factor=0.13025, force_upcast=True),
            text_encoder=transformers.CLIPTextModel(_clip(tokenizer)),
            text_encoder_2=transformers.CLIPTextModelWithProjection(_clip(tokenizer_2, hidden_act="gelu")),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=diffusers.EulerDiscreteScheduler(**_LATENT_DIFFUSION, timestep_spacing="leading"),
            add_watermarker=False,
        )
    # SDXL's own config contains keys of other samplers too.
    foreign = {"clip_sample": False, "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True}
    return _save(pipe, folder, {**foreign, **scheduler})


def build_sd3(folder: Path, t5: bool = True, **scheduler: Any) -> Path:
    """Write a Stable Diffusion 3 that renders 64x64 pictures from 16x8x8 latents, with reproducible bytes.

    Without `t5` its third text encoder and tokenizer are null, a common way to save memory; diffusers then loads it
    only with `text_encoder_3=None, tokenizer_3=None`. `scheduler` sets values in its flow matching Euler config.
    Returns `folder`.
    """
    with _random_weights():
        tokenizer, tokenizer_2 = _tokenizer(), _tokenizer(pad_token="!")
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * _WIDTH,  # wider than both CLIPs concatenated, as in the original
            caption_projection_dim=32,
            pooled_projection_dim=2 * _WIDTH,
            pos_embed_max_size=24,
        )
        pipe = diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            vae=_vae(latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609, **_NO_QUANT_CONVS),
            text_encoder=transformers.CLIPTextModelWithProjection(_clip(tokenizer)),
            text_encoder_2=transformers.CLIPTextModelWithProjection(_clip(tokenizer_2, hidden_act="gelu")),
            text_encoder_3=t5_encoder(3 * _WIDTH) if t5 else None,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            tokenizer_3=t5_tokenizer() if t5 else None,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
    return _save(pipe, folder, scheduler)


def build_flux(folder: Path, guidance_embeds: bool = True, **scheduler: Any) -> Path:
    """Write a Flux that renders 64x64 pictures from 16x8x8 latents, with reproducible bytes.

    It has the structure of FLUX.1-dev; without `guidance_embeds` its transformer is that of FLUX.1-schnell. Its native
    size is 1024x1024, which diffusers does not store in a config. `scheduler` sets values in its flow matching Euler
    config. Returns `folder`.
    """
    with _random_weights():
        tokenizer = _tokenizer()
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=_WIDTH,
            pooled_projection_dim=_WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        )
        pipe = diffusers.FluxPipeline(
            transformer=transformer,
            vae=_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, **_NO_QUANT_CONVS),
            text_encoder=transformers.CLIPTextModel(_clip(tokenizer)),
            text_encoder_2=t5_encoder(_WIDTH),
            tokenizer=tokenizer,
            tokenizer_2=t5_tokenizer(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        )
    return _save(pipe, folder, scheduler)


@contextmanager
def _random_weights() -> Iterator[None]:
    """Draw the same random weights every time, and restore the state of the random generator afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _vae(**config: Any) -> "diffusers.AutoencoderKL":
    """Return a VAE with a scale factor of 8, as in the published checkpoints."""
    return diffusers.AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=8,
        **config,
    )


def _clip(
    tokenizer: "transformers.CLIPTokenizer", num_hidden_layers: int = 3, **config: Any
) -> "transformers.CLIPTextConfig":
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=64,
        projection_dim=_WIDTH,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )


def _tokenizer(**tokens: str) -> "transformers.CLIPTokenizer":
    """Return CLIP's byte-level tokenizer without merges: one token per character."""
    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(character + "</w>" for character in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77, **tokens)


def t5_encoder(width: int) -> "transformers.T5EncoderModel":
    """Return an encoder of T5 v1.1."""
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            tie_word_embeddings=False,
        )
    )


def t5_tokenizer() -> "transformers.T5Tokenizer":
    """Return T5's unigram tokenizer with the printable ASCII characters as pieces; any other character is unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(ord("!"), ord("~") + 1)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def _save(pipe: "diffusers.DiffusionPipeline", folder: Path, scheduler: dict[str, Any]) -> Path:
    pipe.save_pretrained(folder)
    # Written to the file directly: a pipeline corrects outdated values, and a scheduler drops unknown ones.
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **scheduler}))
    return folder
