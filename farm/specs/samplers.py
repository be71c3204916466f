"""Which samplers a spec may name: people's names and diffusers' class names, as plain data.

The names are those of k-diffusion and of the web UIs; each stands for a diffusers noise scheduler and the
config it is built with. diffusers itself is not imported here: a client has none.
`python -m farm.specs.samplers` prints docs/samplers.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Recipe:
    """One of diffusers' noise schedulers, and how it is built from a checkpoint's own config."""

    class_name: str
    config: Mapping[str, object] = field(default_factory=lambda: _NOTHING)
    """Values set over the checkpoint's own."""
    renamed: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    """Values of the checkpoint's own that this class knows by another name: {its name: theirs}."""
    families: tuple[str, ...] = ()
    """diffusers' pipelines that run it, by class name; all with models of its kind if empty."""
    order: int = 1
    """diffusers' word: of order 2, it calls the model twice a step, but for one of the steps."""
    draws_noise: bool = False
    """Whether its steps draw from the request's generator."""

    def over(self, own: Mapping[str, object]) -> dict[str, object]:
        """What `from_config` is to set over a checkpoint's own scheduler config."""
        return {**self.config, **{name: own[theirs] for name, theirs in self.renamed.items() if theirs in own}}

    def fits(self, family: str) -> bool:
        """Whether diffusers' pipeline of that class name runs it."""
        return not self.families or family in self.families


@dataclass(frozen=True)
class Sampler:
    """What one name stands for, by what the model predicts; None where there is no such sampler."""

    diffusion: Recipe | None = None
    """For models that predict noise or v: Stable Diffusion 1.x and 2.x, SDXL."""
    flow: Recipe | None = None
    """For flow matching models: Stable Diffusion 3, Flux."""

    @property
    def class_name(self) -> str:
        """The class for models that predict noise or v."""
        return self._recipe.class_name

    @property
    def config(self) -> Mapping[str, object]:
        """Its values set over the checkpoint's own."""
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
    """A scheduler made for diffusion, told to sample a flow with the checkpoint's own shift of its timesteps."""
    config = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", **config}
    # FlowMatchEulerDiscreteScheduler, whose config the checkpoints carry, calls it otherwise.
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
        # PNDM without its Runge-Kutta steps; most checkpoints' own config says so already.
        "plms": Sampler(Recipe("PNDMScheduler", {"skip_prk_steps": True})),
        "sa_solver": Sampler(Recipe("SASolverScheduler", draws_noise=True)),
        "tcd": Sampler(Recipe("TCDScheduler")),
        "unipc": Sampler(Recipe("UniPCMultistepScheduler"), _flow("UniPCMultistepScheduler")),
        "unipc_karras": Sampler(Recipe("UniPCMultistepScheduler", _KARRAS)),
    }
)
"""Every sampler a spec may name, by the name people know; of those made of one class the plain one first.

Where both columns are filled, diffusers' own pipelines of all families of the kind run it and find a Gaussian's mean
and deviation with it; with Karras sigmas the multistep ones make NaN of a flow.
"""

_TORCHSDE = "draws its noise from torchsde, which the farm does not install; dpmpp_2m_sde is close"
_IGNORES = "has a noise schedule of its own and ignores the checkpoint's: the pictures are wrong; try "
_EDM = "is for EDM models, which scale their inputs and outputs otherwise: the pictures are wrong; try "
_TOKENS = "samples discrete tokens, not latents"
_OTHER_STEP = "takes more than the model's output in a step, which no text-to-image pipeline gives it"
_ANCESTRAL_2S = "is not in diffusers; dpmpp_2s is the one without added noise"
_INVERSE = "turns pictures into noise, not noise into pictures"
_NO_STEP = "has no step that a pipeline can call"

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
        "CogVideoXDDIMScheduler": "is for CogVideoX, whose noise schedule it shifts: the pictures are wrong; try ddim",
        "CogVideoXDPMScheduler": _OTHER_STEP,
        "ConsistencyDecoderScheduler": "is for a VAE's decoder",
        "CosineDPMSolverMultistepScheduler": _TORCHSDE,
        "DDIMInverseScheduler": _INVERSE,
        "DDIMParallelScheduler": "draws what DDIMScheduler draws; use ddim",
        "DDPMParallelScheduler": "draws what DDPMScheduler draws; use ddpm",
        "DDPMWuerstchenScheduler": "is for Würstchen, and lacks what these pipelines ask of a scheduler",
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
        "MiniMaxH3Scheduler": "is for MiniMax H3, and counts timesteps its own way: the pictures are wrong; try euler",
        "PiflowScheduler": "is for models distilled to policies, with timesteps of their own",
        "RFD4ProteinaScheduler": "is for proteins",
        "RePaintScheduler": _OTHER_STEP,
        "SCMScheduler": "is for SANA-Sprint, and parametrized otherwise; try lcm",
        "ScoreSdeVeScheduler": _NO_STEP,
        "ScoreSdeVpScheduler": _NO_STEP,
        "UnCLIPScheduler": "is for unCLIP, whose noise schedule it insists on; try ddpm",
        "VQDiffusionScheduler": _TOKENS,
    }
)
"""Samplers that are known but can't be named in a spec, by people's name or diffusers' class name, and why not."""


def _by_class() -> dict[str, Sampler]:
    """What diffusers' class names stand for: the first sampler made of each, and nothing where the class is no use."""
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
    """The sampler of that name, by people's name (`euler_a`) or diffusers' class name; None if it is no such name."""
    return SAMPLERS.get(name) or _BY_CLASS.get(name)


def sampler_names() -> tuple[str, ...]:
    """People's names for all samplers, sorted."""
    return tuple(sorted(SAMPLERS))


# --- docs/samplers.md

_HEAD = """\
# Samplers

What a spec's `scheduler` may name: one of these names, or diffusers' class name of a noise scheduler. Left out, it is
the model's own. Each name stands for a diffusers class, built from the checkpoint's own config with the values shown
set over it. This page is printed by `python -m farm.specs.samplers`.

A class name stands for the plainest sampler that is made of it. A sampler of order 2 calls the model twice a step, but
for one of the steps. Noise is drawn from the job's own generator, so that its seed still decides the picture; `ddim`
and `tcd` draw some if the spec has an `eta`. `lcm` and `tcd` are for models distilled for them; those that predict
noise or v take 50 steps at most.

| name | Stable Diffusion 1.x and 2.x, SDXL | Stable Diffusion 3, Flux | order | draws noise |
|---|---|---|---|---|"""

_FOOT = """
## Not supported

| name | it |
|---|---|"""


def page() -> str:
    """docs/samplers.md, in Markdown."""
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
