"""What all families of diffusers checkpoints have in common; a family's own file says the rest."""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self, Unpack

import diffusers
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as nn

from farm.errors import BadRequest
from farm.samplers import find_sampler
from farm.spec import RenderSpec
from workers import sampling
from workers.checkpoints import Checkpoint
from workers.loading import Options, Report, load_pipe
from workers.request import RenderRequest, Sampling
from workers.texts import Embedding, Embeddings, remember_texts

log = logging.getLogger(__name__)

DECODED_PIXELS = 4 * 1024 * 1024
"""How many pixels the VAE decodes at once; a single picture that is larger is decoded in tiles."""
PREVIEW_SIZE = 32
"""The longer side of a preview, in latent pixels of 8 by 8."""
_SAMPLINGS = 512
_GRAPHS = 1024
"""How many graphs torch.compile keeps of one block's code: one for each width of a UNet and size of a forward."""


class DiffusersPipeline(ABC):
    """A `Pipeline` over the parts of a built diffusers pipeline, whose pictures it draws.

    Does what that pipeline's own loop does, for many requests at once. Latents stay in float32 between the denoiser's
    calls whatever its precision, so that devices differ less. Attention is diffusers' default, torch's
    `scaled_dot_product_attention`. No safety checker is loaded.
    """

    samplers: ClassVar[str]
    """`diffusion` or `flow`: which recipe of a `farm.samplers.Sampler` it takes."""
    token_limits: ClassVar[Mapping[str, int]] = {}
    """Where diffusers' pipeline cuts texts elsewhere than at a tokenizer's own limit."""

    def __init__(self, pipe: Any, checkpoint: Checkpoint, **options: Unpack[Options]) -> None:
        self.name = checkpoint.source
        self.sha256 = checkpoint.sha256
        self.family = checkpoint.family
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
        self.compiled = options.get("compile", False)
        if self.compiled:
            # Only the blocks that repeat: a minute instead of ten. A graph for each size, since those are measured.
            self.denoiser.compile_repeated_blocks(fullgraph=True, dynamic=False, recompile_limit=_GRAPHS)
        self._samplings: dict[Any, Sampling] = {}
        self._lock = threading.Lock()  # of the one above
        self.embeddings = Embeddings(options.get("embeddings", 1024))
        self._gathered: tuple[Sequence[Embedding], int, Embedding] = ((), 0, {})

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        report: Report,
        **options: Unpack[Options],
    ) -> Self:
        """Load a checked checkpoint onto the device. Raises `ModelError`, or `torch.OutOfMemoryError`."""
        return cls(load_pipe(checkpoint, device, dtype, report), checkpoint, **options)

    # --- what a family says

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

    # --- the verbs

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
        # Only flows shift their timesteps by size.
        key = (spec.scheduler, spec.num_inference_steps, spec.eta, shape if self.samplers == "flow" else None)
        with self._lock:
            found = self._samplings.get(key)
        if found is None:
            found = self._sampling(spec, shape)
            with self._lock:
                if len(self._samplings) >= _SAMPLINGS:
                    self._samplings.clear()
                self._samplings[key] = found
        request.sampling = found
        return shape

    def encode(self, request: RenderRequest) -> None:
        """Embed the texts and draw the first noise, on the CPU so that every device starts equal."""
        spec = request.spec
        request.generator = torch.Generator("cpu").manual_seed(spec.seed)
        sampling.start(request, self.noise(self.shape(*self.size(spec)), request.generator))
        texts = [("prompt", spec.prompt, spec.clip_skip, False)]
        if request.rows == 2:
            texts.insert(0, ("negative prompt", spec.negative_prompt, None, True))
        rows = []
        for what, text, clip_skip, negative in texts:
            embedding, cuts = self._embedding(text, clip_skip, negative=negative)
            rows.append(self.conditioned(embedding, spec))
            request.warnings += [f"the {what} {cut}" for cut in cuts]
        request.conditioning = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def denoise(self, requests: Sequence[RenderRequest], rows: int | None = None) -> torch.Tensor:
        """One call of the denoiser: a row for each request, two if it is guided, a timestep for each row."""
        inputs = sampling.inputs(requests)
        timesteps = [request.sampling.timesteps[request.step_index] for request in requests]
        places = [place for place, request in enumerate(requests) for _ in range(request.rows)]
        places += [0] * max(0, (rows or 0) - len(places))
        if len(places) > len(requests):
            inputs = inputs[sampling.to_device(torch.tensor(places), self.device)]
        outputs = self.forward(
            inputs.to(self.dtype),
            sampling.column([timesteps[place] for place in places], inputs).flatten(),
            self._gather(requests, len(places)),
        ).float()
        return self._guide(requests, outputs)

    def step(self, requests: Sequence[RenderRequest], outputs: torch.Tensor) -> torch.Tensor:
        """All at once, or the one request that has a noise scheduler of its own."""
        if requests[0].scheduler is not None:
            return sampling.step_object(requests[0], outputs)
        return sampling.step(requests, outputs)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's decoder, over slices that it has room for; a very large picture in tiles."""
        return self._decode(self.unscaled(latents))

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """The same of latents shrunk to `PREVIEW_SIZE`: a linear map to RGB is cheaper, but does not suit every VAE."""
        latents = self.unscaled(latents)
        longest = max(latents.shape[-2:])
        if longest > PREVIEW_SIZE:
            latents = nn.interpolate(latents, scale_factor=PREVIEW_SIZE / longest, mode="area")
        return self._decode(latents)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        latents = latents.to(vae.dtype)
        width, height = (size * self.pipe.vae_scale_factor for size in (latents.shape[-1], latents.shape[-2]))
        pictures = []
        for slice_ in torch.split(latents, max(1, DECODED_PIXELS // (width * height))):
            decode = vae.tiled_decode if width * height > DECODED_PIXELS else vae.decode
            try:
                decoded = decode(slice_, return_dict=False)[0]
            except torch.OutOfMemoryError:
                if len(slice_) > 1:
                    raise  # the engine decodes them one by one
                log.warning("a picture of %dx%d does not fit the VAE whole: decoding it in tiles", width, height)
                decoded = vae.tiled_decode(slice_, return_dict=False)[0]
            pictures.append((decoded.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(pictures)

    # --- beneath them

    def _sampling(self, spec: RenderSpec, shape: tuple[int, ...]) -> Sampling:
        # Building diffusers' pipeline rewrote this config (steps_offset, clip_sample): the file's differs.
        base, steps = self.pipe.scheduler, spec.num_inference_steps
        kind, config = type(base), dict[str, Any]()
        if spec.scheduler is not None:
            sampler = find_sampler(spec.scheduler)
            recipe = getattr(sampler, self.samplers, None)
            if recipe is None or not recipe.fits(self.family):
                raise BadRequest(f"{self.name} ({self.family}) can't be sampled with {spec.scheduler!r}")
            kind, config = getattr(diffusers, recipe.class_name), recipe.over(base.config)

        def make() -> Any:
            scheduler = kind.from_config(base.config, **config)
            # Timesteps stay on the CPU: looking one up on a GPU would wait for it.
            kwargs = self.timestep_kwargs(scheduler, steps, shape)
            scheduler.set_timesteps(**({} if "sigmas" in kwargs else {"num_inference_steps": steps}), **kwargs)
            return scheduler

        try:
            return sampling.tabulate(make, eta=spec.eta)
        except Exception as error:
            raise BadRequest(f"{self.name} can't be sampled in {steps} steps of {kind.__name__}: {error}") from error

    def _embedding(self, text: str, clip_skip: int | None, *, negative: bool) -> tuple[Embedding, list[str]]:
        def make() -> tuple[Embedding, list[str]]:
            return self.embed(text, clip_skip, negative=negative), self._cuts(text)

        return self.embeddings.get(text, (clip_skip, negative), make)

    def _cuts(self, text: str) -> list[str]:
        """What each tokenizer leaves out of a text, as the end of a warning."""
        cuts = []
        for number in ("", "_2", "_3"):
            tokenizer = getattr(self.pipe, f"tokenizer{number}", None)
            if tokenizer is None:
                continue
            limit = self.token_limits.get(f"tokenizer{number}", tokenizer.model_max_length)
            rest = tokenizer(text, truncation=True, max_length=limit, return_overflowing_tokens=True).input_ids[1:]
            if rest:
                words = tokenizer.decode([token for row in rest for token in row], skip_special_tokens=True)
                encoder = f" for text_encoder{number}" if number else ""
                cuts.append(f"was cut at {limit} tokens{encoder}; left out: {words:.200}")
        return cuts

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

    def _guide(self, requests: Sequence[RenderRequest], outputs: torch.Tensor) -> torch.Tensor:
        """Classifier-free guidance over rows (negative, positive); a single row has none."""
        if all(request.rows == 1 for request in requests):
            return outputs[: len(requests)]
        negative, positive, place = [], [], 0
        for request in requests:
            negative.append(place)
            place += request.rows
            positive.append(place - 1)
        index = sampling.to_device(torch.tensor([negative, positive]), self.device)
        without, with_text = outputs[index[0]], outputs[index[1]]
        scales = sampling.column([self.guidance(request.spec) for request in requests], outputs)
        guided = without + scales * (with_text - without)
        rescale = [request.spec.guidance_rescale if request.rows == 2 else 0.0 for request in requests]
        if any(rescale):
            # Lin et al. 2023, section 3.4, as diffusers' rescale_noise_cfg, each request by its own factor.
            deviation = [
                tensor.flatten(1).std(1).view(-1, *[1] * (outputs.dim() - 1)) for tensor in (with_text, guided)
            ]
            factor = sampling.column(rescale, outputs)
            rescaled = factor * (guided * (deviation[0] / deviation[1])) + (1 - factor) * guided
            guided = torch.where(factor > 0, rescaled, guided)
        return guided
