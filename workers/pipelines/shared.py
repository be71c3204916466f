"""The common base class of the families of diffusers checkpoints."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor

from farm.errors import BadRequest
from farm.specs.guidance import Guidance
from farm.specs.spec import TEXT_OPTIONS, RenderSpec
from workers.models.checkpoints import Checkpoint
from workers.pipelines.loading import compile_blocks, load_pipe
from workers.pipelines.peak_memory import peak_bytes
from workers.pipelines.texts import Embedding, Embeddings, Text, left_out, remember_texts
from workers.pipelines.vae import decode, shrunk
from workers.render.pipeline import Options, Report
from workers.render.request import RenderRequest
from workers.sampling import tables
from workers.sampling.guidance import guide
from workers.sampling.noise_schedulers import NoiseSchedulers


class DiffusersPipeline(ABC):
    """A `Pipeline` over the parts of a diffusers pipeline; it draws the same pictures.

    It runs that pipeline's denoising loop for many requests at once. Latents stay in float32 between the denoiser's
    calls, so that devices differ less. Attention is diffusers' default, torch's `scaled_dot_product_attention`. No
    safety checker is loaded.
    """

    samplers: ClassVar[str]
    """`diffusion` or `flow`: which recipe of a `farm.specs.samplers.Sampler` it takes."""
    text_options: ClassVar[frozenset[str]] = frozenset()
    """The spec's text options that it takes: a spec with another one is refused."""

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
        self.compiled = kw.get("compile", False) and compile_blocks(self.denoiser)
        self._schedulers = NoiseSchedulers(pipe.scheduler, self.family, self.samplers, self.name)
        self.embeddings = Embeddings(kw.get("embeddings", 1024))
        self._gathered: tuple[Sequence[Embedding], int, Embedding] = ((), 0, {})

    def amended(self, pipe: Any) -> Any:
        """The diffusers pipeline, after corrections that its class needs."""
        return pipe

    @abstractmethod
    def embed(self, text: Text) -> Embedding:
        """One text's embedding, by diffusers' own `encode_prompt`."""

    @abstractmethod
    def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Embedding) -> torch.Tensor:
        """One call of the denoiser: (rows, *shape) in its dtype, (rows,) float32; (rows, *shape)."""

    @property
    def guidance(self) -> Guidance:
        """When a picture is guided, which doubles its rows: with a `guidance_scale` above 1."""
        return Guidance("guidance_scale")

    def rows(self, spec: RenderSpec) -> int:
        """The number of rows of a request in a forward: (negative, positive) with guidance, else one."""
        return self.guidance.factor_of(spec)

    def combine(self, outputs: torch.Tensor, requests: Sequence[RenderRequest]) -> torch.Tensor:
        """One output for each request, (requests, *shape), of the forward's (rows, *shape)."""
        return guide(
            outputs,
            [request.rows for request in requests],
            [self.guidance.scale_of(request.spec) for request in requests],
            [request.spec.guidance_rescale for request in requests],
        )

    def conditioned(self, embedding: Embedding, spec: RenderSpec) -> Embedding:
        """A row's embedding with the denoiser's other inputs, such as sizes."""
        return embedding

    def token_limits(self, options: RenderSpec) -> Mapping[str, int]:
        """The limits at which diffusers' pipeline cuts texts, by tokenizer, if they are not the tokenizer's own."""
        return {}

    @property
    def clip_layers(self) -> int:
        """The number of layers of the text encoder that `clip_skip` skips; used only if a spec sets it."""
        return int(self.pipe.text_encoder.config.num_hidden_layers)

    def timestep_kwargs(self, scheduler: Any, steps: int, shape: tuple[int, ...]) -> dict[str, Any]:
        """The arguments of `set_timesteps` in diffusers' pipeline, beside the number of steps."""
        return {}

    def mu(self, scheduler: Any, tokens: int, max_shift: float) -> float:
        """The shift of a flow's timesteps for a picture of that many tokens (Esser et al. 2024)."""
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
        """(width, height) in pixels, as the denoiser was trained."""
        factor, native = self.pipe.vae_scale_factor, self.denoiser.config.sample_size
        rows, columns = (native, native) if isinstance(native, int) else native
        return columns * factor, rows * factor

    @property
    def multiple(self) -> int:
        """Width and height must be multiples of this, in pixels."""
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
        """Choose rows and sampling; raises `BadRequest` for a size, sampler or option that this checkpoint lacks."""
        spec = request.spec
        shape = self.shape(*self.size(spec))
        self._check_text_options(spec)
        request.rows = self.rows(spec)
        request.text_tokens = sum(self.token_limits(spec).values())
        request.sampling = self._schedulers.sampling(
            spec, shape, lambda scheduler: self.timestep_kwargs(scheduler, spec.num_inference_steps, shape)
        )
        return shape

    def encode(self, request: RenderRequest) -> None:
        """Embed the texts and draw the first noise, on the CPU so that every device starts equal."""
        spec = request.spec
        request.generator = torch.Generator("cpu").manual_seed(spec.seed)
        tables.start(request, self.noise(self.shape(*self.size(spec)), request.generator))
        texts = [Text.of(spec, negative=True), Text.of(spec)]
        rows = []
        for text in texts[-request.rows :]:
            embedding, cuts = self.embeddings.get(text, self._embedded)
            rows.append(self.conditioned(embedding, spec))
            request.warnings += [f"the {'negative ' * text.negative}prompt {cut}" for cut in cuts]
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
        return self.combine(outputs, requests)

    def step(self, requests: Sequence[RenderRequest], outputs: torch.Tensor) -> torch.Tensor:
        """By the samplers' tables at once; or a single request by its own noise scheduler."""
        if requests[0].scheduler is not None:
            return tables.step_object(requests[0], outputs)
        return tables.step(requests, outputs)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """By the VAE's decoder, in slices that fit into memory; very large pictures in tiles."""
        return decode(self.pipe.vae, self.unscaled(latents), self.pipe.vae_scale_factor)

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """The same for shrunk latents: a linear map to RGB is cheaper, but does not suit every VAE."""
        return decode(self.pipe.vae, shrunk(self.unscaled(latents)), self.pipe.vae_scale_factor)

    def forward_bytes(self, spec: RenderSpec) -> int:
        """Traced; half of that if it is compiled, since fused operators do not store every intermediate result."""
        request = RenderRequest("room", spec)
        with torch.inference_mode():
            self.plan(request)
            self.encode(request)

        def forward() -> torch.Tensor:
            inputs = torch.cat([request.latents] * request.rows).to(self.dtype)
            return self.forward(inputs, torch.ones(request.rows, device=self.device), request.conditioning)

        return peak_bytes(forward) // (2 if self.compiled else 1)

    def _check_text_options(self, spec: RenderSpec) -> None:
        for option in TEXT_OPTIONS:
            if getattr(spec, option) is not None and option not in self.text_options:
                raise BadRequest(f"{self.name} has no {option}: a {self.family} does not take it")
        if spec.clip_skip is not None and spec.clip_skip >= (layers := self.clip_layers):
            raise BadRequest(f"{self.name} can't skip {spec.clip_skip} of its text encoder's {layers} layers")

    def _embedded(self, text: Text) -> tuple[Embedding, list[str]]:
        return self.embed(text), left_out(self.pipe, text.text, self.token_limits(text.options))

    def _gather(self, requests: Sequence[RenderRequest], rows: int) -> Embedding:
        """The requests' conditioning, concatenated by rows; kept while the same requests share forwards."""
        parts, (before, rows_before, gathered) = [request.conditioning for request in requests], self._gathered
        same = rows == rows_before and len(parts) == len(before)
        if not same or any(part is not other for part, other in zip(parts, before, strict=True)):
            missing = rows - sum(request.rows for request in requests)
            filled = [{name: part[:1].expand(missing, *part.shape[1:]) for name, part in parts[0].items()}]
            gathered = {name: torch.cat([part[name] for part in (*parts, *filled)]) for name in parts[0]}
            self._gathered = (parts, rows, gathered)
        return gathered
