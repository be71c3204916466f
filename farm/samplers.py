"""Which samplers a spec may name: people's names and diffusers' class names, as plain data.

The names are those of k-diffusion and of the web UIs; each stands for a diffusers noise scheduler and the
config it is built with. diffusers itself is not imported here: a client has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Sampler:
    """A diffusers noise scheduler by its class name, and the config values set over the checkpoint's own."""

    class_name: str
    config: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


_KARRAS = MappingProxyType({"use_karras_sigmas": True})

SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "ddim": Sampler("DDIMScheduler"),
        "ddpm": Sampler("DDPMScheduler"),
        "deis": Sampler("DEISMultistepScheduler"),
        "dpmpp_2m": Sampler("DPMSolverMultistepScheduler"),
        "dpmpp_2m_karras": Sampler("DPMSolverMultistepScheduler", _KARRAS),
        "dpmpp_2s": Sampler("DPMSolverSinglestepScheduler"),
        "euler": Sampler("EulerDiscreteScheduler"),
        "euler_a": Sampler("EulerAncestralDiscreteScheduler"),
        "euler_karras": Sampler("EulerDiscreteScheduler", _KARRAS),
        "heun": Sampler("HeunDiscreteScheduler"),
        "kdpm2": Sampler("KDPM2DiscreteScheduler"),
        "kdpm2_a": Sampler("KDPM2AncestralDiscreteScheduler"),
        "lms": Sampler("LMSDiscreteScheduler"),
        "pndm": Sampler("PNDMScheduler"),
        "unipc": Sampler("UniPCMultistepScheduler"),
    }
)
"""Every sampler a spec may name, by the name people know."""

_BY_CLASS = {sampler.class_name: sampler for sampler in reversed(tuple(SAMPLERS.values()))}


def find_sampler(name: str) -> Sampler | None:
    """The sampler of that name, by people's name (`euler_a`) or diffusers' class name; None if unknown."""
    return SAMPLERS.get(name) or _BY_CLASS.get(name)


def sampler_names() -> tuple[str, ...]:
    """People's names for all samplers, sorted."""
    return tuple(sorted(SAMPLERS))
