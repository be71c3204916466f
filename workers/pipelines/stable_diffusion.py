"""Stable Diffusion 1.x and 2.x through diffusers' own components: CLIP text encoder, UNet, noise schedulers, VAE.

Latent diffusion (Rombach et al. 2022), predicting noise or v. Does what `StableDiffusionPipeline` does, with two
differences. Latents stay in float32 between the UNet's calls whatever its precision, so that devices differ less. And
no safety checker is loaded.
"""

from inspect import signature
from typing import Any

import diffusers
import torch
import transformers
from diffusers.utils import is_accelerate_available
from diffusers.utils.torch_utils import randn_tensor

from farm.errors import BadRequest, ModelError
from farm.samplers import find_sampler
from farm.spec import RenderSpec
from workers.checkpoints import Checkpoint
from workers.request import RenderRequest


class StableDiffusion:
    """A `Pipeline` over the parts of a built `diffusers.StableDiffusionPipeline`."""

    def __init__(self, pipe: Any, name: str, sha256: str) -> None:
        self.name = name
        self.sha256 = sha256
        self.device: torch.device = pipe.device
        self.dtype: torch.dtype = pipe.unet.dtype
        self.nbytes = sum(
            parameter.numel() * parameter.element_size()
            for part in (pipe.text_encoder, pipe.unet, pipe.vae)
            for parameter in part.parameters()
        )
        self._pipe = pipe
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise ModelError(f"{name}: its unet takes the guidance as an input, which the farm does not render")
        if self.device.type == "cuda":
            pipe.unet.to(memory_format=torch.channels_last)
            pipe.vae.to(memory_format=torch.channels_last)

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels, which the UNet was trained for."""
        factor, native = self._pipe.vae_scale_factor, self._pipe.unet.config.sample_size
        rows, columns = (native, native) if isinstance(native, int) else native
        return columns * factor, rows * factor

    def latent_shape(self, spec: RenderSpec) -> tuple[int, ...]:
        """(channels, height, width) in latent pixels, 1/8 of the picture's in SD 1.x and 2.x."""
        factor, (native_width, native_height) = self._pipe.vae_scale_factor, self.native_size
        height, width = spec.height or native_height, spec.width or native_width
        if height % factor or width % factor:
            raise BadRequest(f"{self.name} draws multiples of {factor} pixels, not {width}x{height}")
        return (self._pipe.unet.config.in_channels, height // factor, width // factor)

    def encode(self, request: RenderRequest) -> None:
        """Embed the texts and draw the first noise, on the CPU so that every device starts equal.

        Raises `BadRequest` for a sampler that this checkpoint, or this number of steps, can't be sampled with.
        """
        spec = request.spec
        request.generator = torch.Generator("cpu").manual_seed(spec.seed)
        request.scheduler = self._scheduler(spec)
        request.timesteps = request.scheduler.timesteps
        noise = randn_tensor((1, *self.latent_shape(spec)), request.generator, device=self.device, dtype=torch.float32)
        request.latents = noise * request.scheduler.init_noise_sigma
        embeddings = [self._embed("prompt", spec.prompt, request)]
        if request.guided:
            embeddings.insert(0, self._embed("negative prompt", spec.negative_prompt, request))
        request.conditioning = {"encoder_hidden_states": torch.cat(embeddings)}

    def denoise(self, requests: list[RenderRequest]) -> list[torch.Tensor]:
        """One call of the UNet: a row for each request, two if it is guided, a timestep for each row."""
        texts = [request.conditioning["encoder_hidden_states"] for request in requests]
        rows = [len(text) for text in texts]
        latents, timesteps = [], []
        for request, count in zip(requests, rows, strict=True):
            timestep = request.timesteps[request.step_index]
            scaled = request.scheduler.scale_model_input(request.latents, timestep)
            latents.append(scaled.expand(count, -1, -1, -1))
            timesteps.append(timestep.float().expand(count))
        outputs = self._pipe.unet(
            torch.cat(latents).to(self.dtype),
            torch.cat(timesteps).to(self.device),
            encoder_hidden_states=torch.cat(texts),
            return_dict=False,
        )[0]
        return [
            _guide(output, request.spec.guidance_scale)
            for request, output in zip(requests, outputs.float().split(rows), strict=True)
        ]

    def step(self, request: RenderRequest, output: torch.Tensor) -> None:
        """One step of the request's own noise scheduler; ancestral ones draw from its generator."""
        scheduler = request.scheduler
        draws_noise = "generator" in signature(scheduler.step).parameters
        extra = {"generator": request.generator} if draws_noise else {}
        timestep = request.timesteps[request.step_index]
        request.latents = scheduler.step(output, timestep, request.latents, return_dict=False, **extra)[0]

    def decode(self, requests: list[RenderRequest]) -> torch.Tensor:
        """One call of the VAE's decoder for all of them."""
        latents = torch.cat([request.latents for request in requests]) / self._pipe.vae.config.scaling_factor
        pictures = self._pipe.vae.decode(latents.to(self.dtype), return_dict=False)[0]
        decoded: torch.Tensor = self._pipe.image_processor.postprocess(pictures.float(), output_type="pt")
        return decoded

    def _scheduler(self, spec: RenderSpec) -> Any:
        # Building the StableDiffusionPipeline rewrote this config (steps_offset, clip_sample): the file's differs.
        base = self._pipe.scheduler
        sampler = find_sampler(spec.scheduler) if spec.scheduler else None
        kind = getattr(diffusers, sampler.class_name) if sampler else type(base)
        try:
            scheduler = kind.from_config(base.config, **(sampler.config if sampler else {}))
            # Timesteps stay on the CPU: looking one up on a GPU would wait for it.
            scheduler.set_timesteps(spec.num_inference_steps)
        except Exception as error:
            steps = spec.num_inference_steps
            raise BadRequest(f"{self.name} can't be sampled in {steps} steps of {kind.__name__}: {error}") from error
        return scheduler

    def _embed(self, what: str, text: str, request: RenderRequest) -> torch.Tensor:
        """(1, 77, width): the text's embedding; a text cut short is a warning of the request."""
        tokenizer, encoder = self._pipe.tokenizer, self._pipe.text_encoder
        limit = tokenizer.model_max_length
        tokens = tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=limit,
            return_overflowing_tokens=True,
            return_tensors="pt",
        ).to(self.device)
        if len(tokens.input_ids) > 1:
            rest = tokenizer.decode(tokens.input_ids[1:].flatten(), skip_special_tokens=True)
            request.warnings.append(f"the {what} was cut at {limit} tokens; left out: {rest:.200}")
        mask = tokens.attention_mask[:1] if getattr(encoder.config, "use_attention_mask", False) else None
        embedding: torch.Tensor = encoder(tokens.input_ids[:1], attention_mask=mask)[0]
        return embedding


def load(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """Load a checked checkpoint onto the device.

    Raises `ModelError`, or `torch.OutOfMemoryError` if the device has no room for it.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            checkpoint.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=is_accelerate_available(),
            safety_checker=None,
            feature_extractor=None,
            image_encoder=None,
            requires_safety_checker=False,
        ).to(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{checkpoint.path} can't be loaded: {error}") from error
    return StableDiffusion(pipe, checkpoint.source, checkpoint.sha256)


def _guide(output: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance over the rows (negative, positive); a single row has none."""
    if len(output) == 1:
        return output
    negative, positive = output.chunk(2)
    return negative + scale * (positive - negative)
