"""What all families of diffusers checkpoints have in common; a family's own file says the rest."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor

from farm.errors import BadRequest
from farm.specs.spec import RenderSpec
from workers.models.checkpoints import Checkpoint
from workers.pipelines.loading import load_pipe
from workers.pipelines.texts import Embedding, Embeddings, left_out, remember_texts
from workers.pipelines.traced import peak_bytes
from workers.pipelines.vae import decode, shrunk
from workers.render.pipeline import Options, Report
from workers.render.request import RenderRequest
from workers.sampling import tables
from workers.sampling.guidance import guide
from workers.sampling.noise_schedulers import NoiseSchedulers

_GRAPHS = 1024
"""How many graphs torch.compile keeps of one block's code: one for each width of a UNet and size of a forward."""


class DiffusersPipeline(ABC):
    """A `Pipeline` over the parts of a built diffusers pipeline, whose pictures it draws.

    Does what that pipeline's own loop does, for many requests at once. Latents stay in float32 between the denoiser's
    calls whatever its precision, so that devices differ less. Attention is diffusers' default, torch's
    `scaled_dot_product_attention`. No safety checker is loaded.
    """

    samplers: ClassVar[str]
    """`diffusion` or `flow`: which recipe of a `farm.specs.samplers.Sampler` it takes."""
    token_limits: ClassVar[Mapping[str, int]] = {}
    """Where diffusers' pipeline cuts texts elsewhere than at a tokenizer's own limit."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        report: Report,
        **kw: Unpack[Options],
    ) -> None:
        """Load a checked checkpoint onto the device. Raises `ModelError`, or `torch.OutOfMemoryError`."""
        pipe = self.amended(load_pipe(checkpoint, device, dtype, report))
        self.name, self.sha256, self.family = checkpoint.source, checkpoint.sha256, checkpoint.family
        self.pipe = pipe
        self.denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
        self.device: torch.device = pipe.device
        self.dtype: torch.dtype = self.denoiser.dtype
        models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        self.nbytes = sum(tensor.numel() * tensor.element_size() for part in models for tensor in part.parameters())
        for convolutional in (self.denoiser, pipe.vae):
            convolutional.to(memory_format=torch.channels_last)
        if self.device.type == "cpu":
            remember_texts(self.denoiser)
        self.compiled = kw.get("compile", False)
        if self.compiled:
            # Only the blocks that repeat: a minute instead of ten. A graph for each size, since those are measured.
            self.denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False, recompile_limit=_GRAPHS)
        self._schedulers = NoiseSchedulers(pipe.scheduler, self.family, self.samplers, self.name)
        self.embeddings = Embeddings(kw.get("embeddings", 1024))
        self._gathered: tuple[Sequence[Embedding], int, Embedding] = ((), 0, {})

    def amended(self, pipe: Any) -> Any:
        """Diffusers' pipeline, with what is not as it should be changed."""
        return pipe

    @abstractmethod
    def embed(self, text: str, clip_skip: int | None, *, negative: bool) -> Embedding:
        """One text's embeddings, by diffusers' own encode_prompt."""

    @abstractmethod
    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Embedding) -> torch.Tensor:
        """One call of the denoiser: (rows, *shape) in its dtype, (rows,) float32; (rows, *shape)."""

    def guidance(self, spec: RenderSpec) -> float:
        """The scale of classifier-free guidance; there is none up to 1, and a request takes one row."""
        return spec.guidance_scale

    def conditioned(self, embedding: Embedding, spec: RenderSpec) -> Embedding:
        """A row's embedding with what else the denoiser wants to know, such as sizes."""
        return embedding

    def timestep_kwargs(self, scheduler: Any, steps: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """What diffusers' pipeline hands to `set_timesteps` beside the number of steps."""
        return {}

    def mu(self, scheduler: Any, tokens: int, max_shift: float) -> float:
        """By how much a flow's timesteps are shifted for a picture of so many tokens (Esser et al. 2024)."""
        defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": max_shift}
        return float(calculate_shift(tokens, *(scheduler.config.get(name, value) for name, value in defaults.items())))

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """The first noise, (1, *shape), drawn as diffusers' pipeline does."""
        noise: torch.Tensor = randn_tensor((1, *shape), generator, device=self.device, dtype=torch.float32)
        return noise

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE's decoder takes them: (n, channels, height, width)."""
        config = self.pipe.vae.config
        return latents / float(config.scaling_factor) + float(config.shift_factor or 0)

    @property
    def native_size(self) -> tuple[int, int]:
        """(width, height) in pixels, which the denoiser was trained for."""
        factor, native = self.pipe.vae_scale_factor, self.denoiser.config.sample_size
        rows, columns = (native, native) if isinstance(native, int) else native
        return columns * factor, rows * factor

    @property
    def multiple(self) -> int:
        """What width and height must be multiples of, in pixels."""
        return int(self.pipe.vae_scale_factor)

    def shape(self, width: int, height: int) -> tuple[int, ...]:
        """(channels, height, width) in latent pixels."""
        factor = self.pipe.vae_scale_factor
        return (self.denoiser.config.in_channels, height // factor, width // factor)

    def size(self, spec: RenderSpec) -> tuple[int, int]:
        """(width, height) of a spec in pixels. Raises `BadRequest` if the model can't draw that size."""
        native_width, native_height = self.native_size
        width, height = spec.width or native_width, spec.height or native_height
        if height % self.multiple or width % self.multiple:
            raise BadRequest(f"{self.name} draws multiples of {self.multiple} pixels, not {width}x{height}")
        return width, height

    def plan(self, request: RenderRequest) -> tuple[int, ...]:
        """Choose rows and sampling; raises `BadRequest` for a size or sampler that this checkpoint can't do."""
        spec = request.spec
        shape = self.shape(*self.size(spec))
        layers = self.pipe.text_encoder.config.num_hidden_layers
        if (spec.clip_skip or 0) >= layers:
            raise BadRequest(f"{self.name} can't skip {spec.clip_skip} of its text encoder's {layers} layers")
        request.rows = 2 if self.guidance(spec) > 1 else 1
        request.sampling = self._schedulers.sampling(
            spec, shape, lambda scheduler: self.timestep_kwargs(scheduler, spec.num_inference_steps, shape)
        )
        return shape

    def encode(self, request: RenderRequest) -> None:
        """Embed the texts and draw the first noise, on the CPU so that every device starts equal."""
        spec = request.spec
        request.generator = torch.Generator("cpu").manual_seed(spec.seed)
        tables.start(request, self.noise(self.shape(*self.size(spec)), request.generator))
        texts = [("prompt", spec.prompt, spec.clip_skip, False)]
        if request.rows == 2:
            texts.insert(0, ("negative prompt", spec.negative_prompt, None, True))
        rows = []
        for what, text, clip_skip, negative in texts:
            make = partial(self._embedded, text, clip_skip, negative)
            embedding, cuts = self.embeddings.get(text, (clip_skip, negative), make)
            rows.append(self.conditioned(embedding, spec))
            request.warnings += [f"the {what} {cut}" for cut in cuts]
        request.conditioning = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def denoise(self, requests: Sequence[RenderRequest], rows: int | None = None) -> torch.Tensor:
        """One call of the denoiser: a row for each request, two if it is guided, a timestep for each row."""
        inputs = tables.inputs(requests)
        timesteps = [request.sampling.timesteps[request.step_index] for request in requests]
        places = [place for place, request in enumerate(requests) for _ in range(request.rows)]
        places += [0] * max(0, (rows or 0) - len(places))
        if len(places) > len(requests):
            inputs = inputs[tables.to_device(torch.tensor(places), self.device)]
        outputs = self.forward(
            inputs.to(self.dtype),
            tables.column([timesteps[place] for place in places], inputs).flatten(),
            self._gather(requests, len(places)),
        ).float()
        return guide(
            outputs,
            [request.rows for request in requests],
            [self.guidance(request.spec) for request in requests],
            [request.spec.guidance_rescale for request in requests],
        )

    def step(self, requests: Sequence[RenderRequest], outputs: torch.Tensor) -> torch.Tensor:
        """All at once, or the one request that has a noise scheduler of its own."""
        if requests[0].scheduler is not None:
            return tables.step_object(requests[0], outputs)
        return tables.step(requests, outputs)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's decoder, over slices that it has room for; a very large picture in tiles."""
        return decode(self.pipe.vae, self.unscaled(latents), self.pipe.vae_scale_factor)

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """The same of shrunk latents: a linear map to RGB is cheaper, but does not suit every VAE."""
        return decode(self.pipe.vae, shrunk(self.unscaled(latents)), self.pipe.vae_scale_factor)

    def forward_bytes(self, spec: RenderSpec) -> int:
        """Traced; half of that if it is compiled, for then not all that operators make ever exists."""
        request = RenderRequest("room", spec)
        with torch.inference_mode():
            self.plan(request)
            self.encode(request)

        def forward() -> torch.Tensor:
            inputs = torch.cat([request.latents] * request.rows).to(self.dtype)
            return self.forward(inputs, torch.ones(request.rows, device=self.device), request.conditioning)

        return peak_bytes(forward) // (2 if self.compiled else 1)

    def _embedded(self, text: str, clip_skip: int | None, negative: bool) -> tuple[Embedding, list[str]]:
        return self.embed(text, clip_skip, negative=negative), left_out(self.pipe, text, self.token_limits)

    def _gather(self, requests: Sequence[RenderRequest], rows: int) -> Embedding:
        """The requests' conditioning, row under row; kept while the same requests share forwards."""
        parts, (before, rows_before, gathered) = [request.conditioning for request in requests], self._gathered
        same = rows == rows_before and len(parts) == len(before)
        if not same or any(part is not other for part, other in zip(parts, before, strict=True)):
            missing = rows - sum(request.rows for request in requests)
            filled = [{name: part[:1].expand(missing, *part.shape[1:]) for name, part in parts[0].items()}]
            gathered = {name: torch.cat([part[name] for part in (*parts, *filled)]) for name in parts[0]}
            self._gathered = (parts, rows, gathered)
        return gathered
