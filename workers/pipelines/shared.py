"""What all families of diffusers checkpoints have in common; a family's own file says the rest."""

import logging
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar

import diffusers
import torch
import transformers
from diffusers.utils import is_accelerate_available
from diffusers.utils.torch_utils import randn_tensor
from torch.nn import functional as nn

from farm.errors import BadRequest, ModelError
from farm.samplers import find_sampler
from farm.spec import RenderSpec
from workers import sampling
from workers.checkpoints import Checkpoint
from workers.pipelines import Report
from workers.request import RenderRequest, Sampling

log = logging.getLogger(__name__)

Embedding = Mapping[str, torch.Tensor]
"""What the denoiser is told about one text: its keyword arguments, each (1, …)."""

EMBEDDINGS = 1024
"""How many texts a pipeline remembers the embeddings of."""
DECODED_PIXELS = 4 * 1024 * 1024
"""How many pixels the VAE decodes at once; a single picture that is larger is decoded in tiles."""
_SAMPLINGS = 512


class DiffusersPipeline(ABC):
    """A `Pipeline` over the parts of a built diffusers pipeline, whose pictures it draws.

    Does what that pipeline's own loop does, for many requests at once. Latents stay in float32 between the denoiser's
    calls whatever its precision, so that devices differ less. No safety checker is loaded.
    """

    samplers: ClassVar[str]
    """`diffusion` or `flow`: which recipe of a `farm.samplers.Sampler` it takes."""

    def __init__(self, pipe: Any, checkpoint: Checkpoint) -> None:
        self.name = checkpoint.source
        self.sha256 = checkpoint.sha256
        self.family = checkpoint.family
        self.pipe = pipe
        self.denoiser = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
        self.device: torch.device = pipe.device
        self.dtype: torch.dtype = self.denoiser.dtype
        models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
        self.nbytes = sum(tensor.numel() * tensor.element_size() for part in models for tensor in part.parameters())
        self._samplings: dict[Any, Sampling] = {}
        self._embeddings: OrderedDict[Any, tuple[Embedding, tuple[str, ...]]] = OrderedDict()
        self._lock = threading.Lock()  # of the two above
        self._gathered: tuple[Any, Embedding] = (None, {})
        self._projection: torch.Tensor | None = None
        self.embedding_hits = self.embedding_misses = 0

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

    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        """The first noise, (1, *shape), drawn as diffusers' pipeline does."""
        return randn_tensor((1, *shape), generator, device=self.device, dtype=torch.float32)

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE's decoder takes them."""
        config = self.pipe.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        return latents / config.scaling_factor + shift

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
        request.rows = 2 if self.guidance(spec) > 1 else 1
        key = (spec.scheduler, spec.num_inference_steps, spec.eta, shape)
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
            embedding, cut = self._remembered(text, clip_skip, negative=negative)
            rows.append(self.conditioned(embedding, spec))
            request.warnings += [f"the {what} {warning}" for warning in cut]
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
        vae = self.pipe.vae
        latents = self.unscaled(latents).to(vae.dtype)
        width, height = (size * self.pipe.vae_scale_factor for size in (latents.shape[-1], latents.shape[-2]))
        pictures = []
        for slice_ in latents.split(max(1, DECODED_PIXELS // (width * height))):
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

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """A linear map from latent channels to RGB, fitted once to what the VAE makes of random latents."""
        if self._projection is None:
            self._projection = self._fit_projection()
        spatial = self.unscaled(latents)
        ones = torch.ones_like(spatial[:, :1])
        return torch.einsum("nchw,cr->nrhw", torch.cat([spatial, ones], 1), self._projection).clamp(0, 1)

    # --- beneath them

    def _sampling(self, spec: RenderSpec, shape: tuple[int, ...]) -> Sampling:
        # Building diffusers' pipeline rewrote this config (steps_offset, clip_sample): the file's differs.
        base, steps = self.pipe.scheduler, spec.num_inference_steps
        kind, config = type(base), dict[str, Any]()
        if spec.scheduler is not None:
            sampler = find_sampler(spec.scheduler)
            recipe = getattr(sampler, self.samplers, None)
            if recipe is None:
                raise BadRequest(f"{self.name} ({self.family}) can't be sampled with {spec.scheduler!r}")
            kind, config = getattr(diffusers, recipe.class_name), dict(recipe.config)

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

    def _remembered(self, text: str, clip_skip: int | None, *, negative: bool) -> tuple[Embedding, tuple[str, ...]]:
        """A text's embedding and what of the text it leaves out."""
        key = (text, clip_skip, negative)
        with self._lock:
            found = self._embeddings.get(key)
            if found is not None:
                self.embedding_hits += 1
                self._embeddings.move_to_end(key)
                return found
            self.embedding_misses += 1
        made = self.embed(text, clip_skip, negative=negative), tuple(self._cuts(text))
        with self._lock:
            self._embeddings[key] = made
            # The empty prompt is everybody's negative: it never leaves.
            oldest = next(old for old in self._embeddings if old[0])
            if len(self._embeddings) > EMBEDDINGS:
                del self._embeddings[oldest]
        return made

    def _cuts(self, text: str) -> list[str]:
        """What each tokenizer leaves out of a text, as words of a warning."""
        cuts = []
        for number in ("", "_2", "_3"):
            tokenizer = getattr(self.pipe, f"tokenizer{number}", None)
            if tokenizer is None:
                continue
            limit = self.token_limits.get(f"tokenizer{number}", tokenizer.model_max_length)
            tokens = tokenizer(text, truncation=True, max_length=limit, return_overflowing_tokens=True).input_ids
            if tokens and isinstance(tokens[0], list) and len(tokens) > 1:
                rest = tokenizer.decode([token for row in tokens[1:] for token in row], skip_special_tokens=True)
                cuts.append(f"was cut at {limit} tokens{number and f' of text encoder {number[1:]}'}; left out: {rest:.200}")
        return cuts

    token_limits: ClassVar[Mapping[str, int]] = {}
    """Where a family cuts texts elsewhere than at its tokenizer's own limit."""

    def _gather(self, requests: Sequence[RenderRequest], rows: int) -> Embedding:
        """The requests' conditioning, row under row; kept while the same requests share forwards."""
        key = (rows, *map(id, requests))
        if self._gathered[0] != key:
            parts = [request.conditioning for request in requests]
            missing = rows - sum(request.rows for request in requests)
            filled = [{name: part[:1].expand(missing, *part.shape[1:]) for name, part in parts[0].items()}] if missing else []
            gathered = {name: torch.cat([part[name] for part in (*parts, *filled)]) for name in parts[0]}
            self._gathered = (key, gathered)
        return self._gathered[1]

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
            deviation = [tensor.flatten(1).std(1).view(-1, *[1] * (outputs.dim() - 1)) for tensor in (with_text, guided)]
            factor = sampling.column(rescale, outputs)
            rescaled = factor * (guided * (deviation[0] / deviation[1])) + (1 - factor) * guided
            guided = torch.where(factor > 0, rescaled, guided)
        return guided

    def _fit_projection(self) -> torch.Tensor:
        """(channels + 1, 3): least squares from unscaled latents, and a constant, to the decoder's RGB."""
        width, height = self.native_size
        shape = self.shape(min(width, 512), min(height, 512))
        generator = torch.Generator("cpu").manual_seed(0)
        noise = torch.cat([self.noise(shape, generator) for _ in range(2)])
        spatial = self.unscaled(noise)
        # Noise of one latent pixel is nothing a picture has: larger spots say more about colours.
        spots = torch.cat([nn.interpolate(nn.avg_pool2d(spatial, n) * n, spatial.shape[-2:]) for n in (2, 4)])
        pictures = (self.pipe.vae.decode(spots.to(self.pipe.vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
        colours = nn.adaptive_avg_pool2d(pictures, spots.shape[-2:]).movedim(1, -1).flatten(0, 2)
        terms = spots.movedim(1, -1).flatten(0, 2)
        terms = torch.cat([terms, torch.ones_like(terms[:, :1])], 1)
        return torch.linalg.lstsq(terms.cpu(), colours.cpu(), driver="gelsd").solution.to(self.device)


def load_pipe(kind: Any, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, report: Report) -> Any:
    """diffusers' pipeline of a checked checkpoint on the device, its parts loaded one after the other.

    Raises `ModelError`, or `torch.OutOfMemoryError` if the device has no room for it.
    """
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    index = diffusers.DiffusionPipeline.load_config(checkpoint.path)
    parts: dict[str, Any] = {}
    try:
        for place, part in enumerate(checkpoint.parts, 1):
            report(f"{part}, {place} of {len(checkpoint.parts)}")
            library, name = index[part]
            loader = getattr(import_module(library), name)
            weights = hasattr(loader, "forward")
            options = {"dtype": dtype, "use_safetensors": True} if weights else {}
            if library == "diffusers" and weights:
                options["low_cpu_mem_usage"] = is_accelerate_available()
            loaded = loader.from_pretrained(checkpoint.path / part, local_files_only=True, **options)
            parts[part] = loaded.to(device).eval() if weights else loaded
        parts |= {part: None for part in kind._optional_components if part not in parts}  # noqa: SLF001
        if "safety_checker" in parts:
            parts["requires_safety_checker"] = False
        pipe = kind.from_pretrained(checkpoint.path, local_files_only=True, low_cpu_mem_usage=False, **parts)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(f"{checkpoint.path} can't be loaded: {error}") from error
    return pipe
