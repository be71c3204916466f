"""The samplers that a spec may name, by short name or by diffusers' class name, as plain data.

The short names are those of k-diffusion and of the web UIs. Each stands for a noise scheduler of diffusers and the
config values that it is built with. This module does not import diffusers, because clients do not install it.
`python -m farm.specs.samplers` prints docs/samplers.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Recipe:
    """A noise scheduler of diffusers, and how it is built from a checkpoint's config."""

    class_name: str
    config: Mapping[str, object] = field(default_factory=lambda: _NOTHING)
    """Values that override the checkpoint's."""
    renamed: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    """Values of the checkpoint that this class calls differently: {this class's name: the checkpoint's name}."""
    families: tuple[str, ...] = ()
    """Class names of the diffusers pipelines that support it; empty means all pipelines of its kind."""
    order: int = 1
    """As in diffusers: a scheduler of order 2 calls the model twice per step, except for one step."""
    draws_noise: bool = False
    """Whether its steps draw noise from the request's generator."""

    def over(self, own: Mapping[str, object]) -> dict[str, object]:
        """The values with which `from_config` overrides a checkpoint's scheduler config."""
        return {**self.config, **{name: own[theirs] for name, theirs in self.renamed.items() if theirs in own}}

    def fits(self, family: str) -> bool:
        """Whether the diffusers pipeline of that class name supports it."""
        return not self.families or family in self.families


@dataclass(frozen=True)
class Sampler:
    """The recipes of one name, by what the model predicts; None if there is none."""

    diffusion: Recipe | None = None
    """For models that predict noise or v: Stable Diffusion 1.x and 2.x, SDXL."""
    flow: Recipe | None = None
    """For flow matching models: Stable Diffusion 3, Flux."""

    @property
    def class_name(self) -> str:
        """The class name of its first recipe."""
        return self._recipe.class_name

    @property
    def config(self) -> Mapping[str, object]:
        """The config values of its first recipe."""
        return self._recipe.config

    @property
    def _recipe(self) -> Recipe:
        return self.diffusion or self.flow or Recipe("")


_KARRAS = MappingProxyType({"use_karras_sigmas": True})
_BETA = MappingProxyType({"use_beta_sigmas": True})
_SD3 = ("StableDiffusion3Pipeline",)
_MULTISTEP, _SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
_SDE = {"algorithm_type": "sde-dpmsolver++"}


def _flow(class_name: str, draws_noise: bool = False, **config: object) -> Recipe:
    """A diffusion scheduler configured to sample a flow, with the checkpoint's own timestep shift."""
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", **config}
    # The checkpoints carry the config of FlowMatchEulerDiscreteScheduler, which calls the value `shift`.
    return Recipe(class_name, config, renamed={"flow_shift": "shift"}, draws_noise=draws_noise)


SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": Sampler(Recipe("DDIMScheduler")),
        "ddpm": Sampler(Recipe("DDPMScheduler", draws_noise=True)),
        "deis": Sampler(Recipe("DEISMultistepScheduler"), _flow("DEISMultistepScheduler")),
        "deis_karras": Sampler(Recipe("DEISMultistepScheduler", _KARRAS)),
        "dpmpp_2m": Sampler(Recipe(_MULTISTEP), _flow(_MULTISTEP)),
        "dpmpp_2m_exponential": Sampler(Recipe(_MULTISTEP, {"use_exponential_sigmas": True})),
        "dpmpp_2m_karras": Sampler(Recipe(_MULTISTEP, _KARRAS)),
        "dpmpp_2m_lu": Sampler(Recipe(_MULTISTEP, {"use_lu_lambdas": True})),
        "dpmpp_2m_sde": Sampler(Recipe(_MULTISTEP, _SDE, draws_noise=True), _flow(_MULTISTEP, True, **_SDE)),
        "dpmpp_2m_sde_karras": Sampler(Recipe(_MULTISTEP, {**_SDE, **_KARRAS}, draws_noise=True)),
        "dpmpp_2s": Sampler(Recipe(_SINGLESTEP), _flow(_SINGLESTEP)),
        "dpmpp_2s_karras": Sampler(Recipe(_SINGLESTEP, _KARRAS)),
        "dpmpp_3m": Sampler(Recipe(_MULTISTEP, {"solver_order": 3}), _flow(_MULTISTEP, solver_order=3)),
        "dpmpp_3m_karras": Sampler(Recipe(_MULTISTEP, {"solver_order": 3, **_KARRAS})),
        "dpmpp_3m_sde": Sampler(Recipe(_MULTISTEP, {"solver_order": 3, **_SDE}, draws_noise=True)),
        "dpmpp_3m_sde_karras": Sampler(Recipe(_MULTISTEP, {"solver_order": 3, **_SDE, **_KARRAS}, draws_noise=True)),
        "euler": Sampler(Recipe("EulerDiscreteScheduler"), Recipe("FlowMatchEulerDiscreteScheduler")),
        "euler_a": Sampler(
            Recipe("EulerAncestralDiscreteScheduler", draws_noise=True),
            Recipe("LTXEulerAncestralRFScheduler", families=_SD3, draws_noise=True),
        ),
        "euler_beta": Sampler(
            Recipe("EulerDiscreteScheduler", _BETA), Recipe("FlowMatchEulerDiscreteScheduler", _BETA)
        ),
        "euler_karras": Sampler(
            Recipe("EulerDiscreteScheduler", _KARRAS), Recipe("FlowMatchEulerDiscreteScheduler", _KARRAS)
        ),
        "heun": Sampler(
            Recipe("HeunDiscreteScheduler", order=2), Recipe("FlowMatchHeunDiscreteScheduler", families=_SD3, order=2)
        ),
        "heun_karras": Sampler(Recipe("HeunDiscreteScheduler", _KARRAS, order=2)),
        "kdpm2": Sampler(Recipe("KDPM2DiscreteScheduler", order=2)),
        "kdpm2_a": Sampler(Recipe("KDPM2AncestralDiscreteScheduler", order=2, draws_noise=True)),
        "kdpm2_a_karras": Sampler(Recipe("KDPM2AncestralDiscreteScheduler", _KARRAS, order=2, draws_noise=True)),
        "kdpm2_karras": Sampler(Recipe("KDPM2DiscreteScheduler", _KARRAS, order=2)),
        "lcm": Sampler(Recipe("LCMScheduler", draws_noise=True), Recipe("FlowMatchLCMScheduler", draws_noise=True)),
        "lms": Sampler(Recipe("LMSDiscreteScheduler")),
        "lms_karras": Sampler(Recipe("LMSDiscreteScheduler", _KARRAS)),
        "pndm": Sampler(Recipe("PNDMScheduler")),
        # PNDM without its Runge-Kutta steps, as most checkpoints configure it already.
        "plms": Sampler(Recipe("PNDMScheduler", {"skip_prk_steps": True})),
        "sa_solver": Sampler(Recipe("SASolverScheduler", draws_noise=True)),
        "tcd": Sampler(Recipe("TCDScheduler")),
        "unipc": Sampler(Recipe("UniPCMultistepScheduler"), _flow("UniPCMultistepScheduler")),
        "unipc_karras": Sampler(Recipe("UniPCMultistepScheduler", _KARRAS)),
    }
)
"""All samplers that a spec may name, by short name; of several variants of one class the plain one comes first.

A recipe is listed only if diffusers' own pipelines of that kind run it and reproduce the mean and deviation of a
Gaussian with it. With Karras sigmas the multistep schedulers produce NaN for a flow.
"""

_TORCHSDE = "draws its noise from torchsde, which the farm does not install; try dpmpp_2m_sde"
_IGNORES = "ignores the checkpoint's noise schedule, so its pictures are wrong; try "
_EDM = "is for EDM models, which scale inputs and outputs differently: the pictures are wrong; try "
_TOKENS = "samples discrete tokens, not latents"
_OTHER_STEP = "needs more per step than a text-to-image pipeline provides"
_ANCESTRAL_2S = "is not in diffusers; try dpmpp_2s, which adds no noise"
_INVERSE = "turns pictures into noise"
_NO_STEP = "has no step method that a pipeline can call"

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "dpm_adaptive": "is not in diffusers; dpmpp_2m is the usual choice",
        "dpm_fast": "is not in diffusers; dpmpp_2m is the usual choice",
        "dpmpp_2s_a": _ANCESTRAL_2S,
        "dpmpp_2s_a_karras": _ANCESTRAL_2S,
        "dpmpp_sde": _TORCHSDE,
        "dpmpp_sde_karras": _TORCHSDE,
        "ipndm": _IGNORES + "plms",
        "AmusedScheduler": _TOKENS,
        "BlockRefinementScheduler": _TOKENS,
        "CMStochasticIterativeScheduler": "is for consistency models trained from scratch; try lcm",
        "CogVideoXDDIMScheduler": "is for CogVideoX, and shifts the noise schedule: the pictures are wrong; try ddim",
        "CogVideoXDPMScheduler": _OTHER_STEP,
        "ConsistencyDecoderScheduler": "is for a VAE's decoder",
        "CosineDPMSolverMultistepScheduler": _TORCHSDE,
        "DDIMInverseScheduler": _INVERSE,
        "DDIMParallelScheduler": "draws what DDIMScheduler draws; use ddim",
        "DDPMParallelScheduler": "draws what DDPMScheduler draws; use ddpm",
        "DDPMWuerstchenScheduler": "is for Würstchen, and lacks methods that these pipelines need",
        "DPMSolverMultistepInverseScheduler": _INVERSE,
        "DPMSolverSDEScheduler": _TORCHSDE,
        "DiscreteDDIMScheduler": _TOKENS,
        "EDMDPMSolverMultistepScheduler": _EDM + "dpmpp_2m_karras",
        "EDMEulerScheduler": _EDM + "euler_karras",
        "EntropyBoundScheduler": _TOKENS,
        "FlowMapEulerDiscreteScheduler": "is for models distilled to flow maps; try euler",
        "HeliosDMDScheduler": "is for Helios' stages of resolution",
        "HeliosScheduler": "is for Helios' stages of resolution",
        "IPNDMScheduler": _IGNORES + "plms",
        "KarrasVeScheduler": _OTHER_STEP,
        "MiniMaxH3Scheduler": "is for MiniMax H3, whose timesteps differ: the pictures are wrong; try euler",
        "PiflowScheduler": "is for models distilled to policies, with other timesteps",
        "RFD4ProteinaScheduler": "is for proteins",
        "RePaintScheduler": _OTHER_STEP,
        "SCMScheduler": "is for SANA-Sprint, which is parametrized differently; try lcm",
        "ScoreSdeVeScheduler": _NO_STEP,
        "ScoreSdeVpScheduler": _NO_STEP,
        "UnCLIPScheduler": "is for unCLIP, and requires its noise schedule; try ddpm",
        "VQDiffusionScheduler": _TOKENS,
    }
)
"""Known samplers that a spec cannot name, by short name or class name, with the reason."""


def _by_class() -> dict[str, Sampler]:
    """The samplers by class name: the first one that is made of each class."""
    found: dict[str, Sampler] = {}
    for sampler in SAMPLERS.values():
        for kind in ("diffusion", "flow"):
            recipe: Recipe | None = getattr(sampler, kind)
            if recipe is not None:
                earlier = found.get(recipe.class_name, Sampler())
                found[recipe.class_name] = replace(earlier, **{kind: getattr(earlier, kind) or recipe})
    return found


_BY_CLASS = _by_class()


def find_sampler(name: str) -> Sampler | None:
    """The sampler with a short name (`euler_a`) or class name; None if the name is unknown."""
    return SAMPLERS.get(name) or _BY_CLASS.get(name)


def sampler_names() -> tuple[str, ...]:
    """The short names of all samplers, sorted."""
    return tuple(sorted(SAMPLERS))


# --- docs/samplers.md

_HEAD = """\
# Samplers

The `scheduler` of a spec is one of these names, or the class name of a diffusers noise scheduler. The default is the
model's own scheduler. Each name stands for a diffusers class, built from the checkpoint's own config with the values
shown. This page is generated by `python -m farm.specs.samplers`.

A class name stands for the first sampler in this list that uses the class. A sampler of order 2 calls the model twice
per step, except for one step. Noise is drawn from the job's own generator, so the seed determines the picture; `ddim`
and `tcd` draw noise if the spec has an `eta`. `lcm` and `tcd` are for models distilled for them; for models that
predict noise or v they take at most 50 steps.

| name | Stable Diffusion 1.x and 2.x, SDXL | Stable Diffusion 3, Flux | order | draws noise |
|---|---|---|---|---|"""

_FOOT = """
## Not supported

| name | reason: it |
|---|---|"""


def page() -> str:
    """The Markdown text of docs/samplers.md."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD
    for name in sampler_names():
        sampler = SAMPLERS[name]
        recipes = [recipe for recipe in (sampler.diffusion, sampler.flow) if recipe is not None]
        order = max(recipe.order for recipe in recipes)
        noise = "yes" if any(recipe.draws_noise for recipe in recipes) else ""
        yield f"| `{name}` | {_cell(sampler.diffusion)} | {_cell(sampler.flow)} | {order} | {noise} |"
    yield _FOOT
    for name, reason in UNSUPPORTED.items():
        yield f"| `{name}` | {reason} |"


def _cell(recipe: Recipe | None) -> str:
    if recipe is None:
        return "none"
    values = [f"`{key}={value}`" for key, value in recipe.config.items()]
    values += [f"`{name}` its `{theirs}`" for name, theirs in recipe.renamed.items()]
    only = f" (only {', '.join(f'`{family}`' for family in recipe.families)})" if recipe.families else ""
    return f"`{recipe.class_name}`{only}{': ' if values else ''}{', '.join(values)}"


if __name__ == "__main__":
    print(page(), end="")
