"""`RenderSpec`: what to render, with its bounds and its hash."""

import hashlib
import reprlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import ErrorDetails

from farm.errors import InvalidInput, Problem
from farm.specs.samplers import UNSUPPORTED, find_sampler, sampler_names

MIN_SIZE, MAX_SIZE = 64, 4096
"""Bounds of width and height in pixels."""
MAX_SEED = 2**32 - 1
MAX_STEPS = 1000
MAX_TRAJECTORY_STEPS = 200
"""A trajectory has a frame for each step."""
MAX_PROMPT_CHARS = 20_000
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$"
"""The pattern of model names: a hub id (`org/name`) or a plain name, which becomes part of a queue's name."""
_SHOWN_CHARS = 80
URGENT = 90
"""Priority 90 and above is urgent: it preempts running renders between steps."""


def draw_seed() -> int:
    """A random seed from the operating system."""
    return secrets.randbelow(MAX_SEED + 1)


def _multiple_of_8(value: int | None) -> int | None:
    if value is not None and value % 8:
        low = value - value % 8
        raise ValueError(f"must be a multiple of 8, like {max(low, MIN_SIZE)} or {min(low + 8, MAX_SIZE)}")
    return value


def _known_sampler(value: str | None) -> str | None:
    if value is not None and find_sampler(value) is None:
        if value in UNSUPPORTED:
            raise ValueError(f"{value} is not supported: it {UNSUPPORTED[value]}")
        raise ValueError(f"no sampler {value!r}; known are {', '.join(sampler_names())}")
    return value


def _of_few_steps(value: bool, info: ValidationInfo) -> bool:
    # Steps that are out of bounds are not in `data`; they are reported already.
    steps = info.data.get("num_inference_steps", 0)
    if value and steps > MAX_TRAJECTORY_STEPS:
        raise ValueError(f"keeps a picture a step, {MAX_TRAJECTORY_STEPS} at most; num_inference_steps is {steps}")
    return value


def _storable(value: str) -> str:
    # PostgreSQL can't store NUL, and lone surrogates (a badly decoded file) are not UTF-8.
    if "\x00" in value:
        raise ValueError("must not contain a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode; was the file read in the right encoding?") from None
    return value


@dataclass(frozen=True)
class ShortName:
    """A second name of a field, for options and grids."""

    name: str


_STORABLE = AfterValidator(_storable)
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARS), _STORABLE]
"""The type of a prompt; wildcards are expanded in every field of this type."""
Size = Annotated[int | None, Field(ge=MIN_SIZE, le=MAX_SIZE), AfterValidator(_multiple_of_8)]


class TextOption:
    """Marks a field of `RenderSpec` that changes how models embed a text; None must be its default."""


class RenderSpec(BaseModel):
    """One picture, fully described; immutable, with diffusers' parameter names.

    A spec always has a seed: one that is left out (or None) is drawn when the spec is made, so that the same spec
    always gives the same picture. An empty prompt renders unconditionally.

    The fields are also the options of `farm submit`, the columns of CSV and JSONL files and the axes of grids. Their
    docstrings are the help texts and the descriptions in the JSON schema.

    Raises `pydantic.ValidationError`; `RenderSpec.parse` gives the farm's own error instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    prompt: Prompt
    """What to render."""
    negative_prompt: Annotated[Prompt, ShortName("negative")] = ""
    """What to avoid in the picture."""
    num_inference_steps: Annotated[int, ShortName("steps")] = Field(default=25, ge=1, le=MAX_STEPS)
    """The number of denoising steps, 1 to 1000."""
    guidance_scale: Annotated[float, ShortName("guidance")] = Field(default=5.0, ge=0, le=1000)
    """How closely the picture follows the prompt; 1 and below turns classifier-free guidance off."""
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """How far guided noise is rescaled against overexposure, 0 to 1 (Lin et al. 2023, section 3.4)."""
    true_cfg_scale: float = Field(default=1.0, ge=1, le=1000)
    """Flux only: the scale of true classifier-free guidance with the negative prompt; 1 is off."""
    clip_skip: Annotated[int | None, TextOption()] = Field(default=None, ge=1, le=23)
    """How many of CLIP's last layers are skipped."""
    max_sequence_length: Annotated[int | None, TextOption()] = Field(default=None, ge=1, le=512)
    """How many tokens T5 reads of a prompt (Stable Diffusion 3, Flux); the family's own by default."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """The share of fresh noise in each step, 0 to 1, for samplers that have an eta (DDIM, Song et al. 2020)."""
    width: Size = None
    """The width in pixels, a multiple of 8; the model's own by default."""
    height: Size = None
    """The height in pixels, a multiple of 8; the model's own by default."""
    seed: int = Field(default_factory=draw_seed, ge=0, le=MAX_SEED)
    """The seed of the noise, 0 to 4294967295; drawn for each picture by default."""
    scheduler: Annotated[str | None, AfterValidator(_known_sampler), ShortName("sampler")] = None
    """The sampler: a name such as euler_a, or a class name of diffusers; the model's own by default."""
    model: str = Field(default="tiny", pattern=MODEL_NAME)
    """The model's name, as workers serve it."""
    deterministic: bool = False
    """Whether the picture's bytes are independent of what is rendered at the same time; slower."""
    trajectory: Annotated[bool, AfterValidator(_of_few_steps)] = False
    """Whether the picture after every step is kept, as a film strip and an animation; 200 steps at most."""

    @model_validator(mode="before")
    @classmethod
    def _unchosen(cls, values: Any) -> Any:
        # Counts as left out: the submission draws it, and no other spec is the same work.
        if isinstance(values, dict) and "seed" in values and values["seed"] is None:
            return {name: value for name, value in values.items() if name != "seed"}
        return values

    @classmethod
    def parse(cls, values: "dict[str, Any] | str | RenderSpec", where: str = "spec") -> Self:
        """A spec from a prompt, from a mapping of its fields, or from a spec.

        Raises `InvalidInput` with one `Problem` a field, each beginning with `where`.
        """
        if isinstance(values, cls):
            return values
        try:
            return cls.model_validate({"prompt": values} if isinstance(values, str) else values)
        except ValidationError as error:
            raise InvalidInput([_problem(where, detail) for detail in error.errors()]) from error

    def to_json(self) -> str:
        """The spec as SQL stores it and as it is hashed.

        Fields that release 0.1 does not know are left out while they have their defaults: programs of that release can
        then read the spec, and its hash is the one that they computed.
        """
        return self.model_dump_json(
            exclude={name for name, value in _LATER_FIELDS.items() if getattr(self, name) == value}
        )

    def sha256(self) -> str:
        """The hash of all fields: equal specs have equal hashes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


_FIRST_FIELDS = frozenset(
    {
        *("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "guidance_rescale", "true_cfg_scale"),
        *("clip_skip", "eta", "width", "height", "seed", "scheduler", "model", "deterministic", "trajectory"),
    }
)
_LATER_FIELDS = {name: field.default for name, field in RenderSpec.model_fields.items() if name not in _FIRST_FIELDS}
"""The defaults of the fields that release 0.1 does not know."""

SHORT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        short.name: name
        for name, field in RenderSpec.model_fields.items()
        for short in field.metadata
        if isinstance(short, ShortName)
    }
)
"""The fields by their short names, such as `steps`."""
PROMPT_FIELDS = tuple(name for name, field in RenderSpec.model_fields.items() if _STORABLE in field.metadata)
"""The fields of type `Prompt`."""
TEXT_OPTIONS = tuple(
    name
    for name, field in RenderSpec.model_fields.items()
    if any(isinstance(mark, TextOption) for mark in field.metadata)
)
"""The fields that are marked as a `TextOption`."""

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 4 * _SHOWN_CHARS


def shown(value: object) -> str:
    """The beginning of a value for a message; takes little time for values of any size."""
    try:
        return f"{_BRIEF.repr(value):.{_SHOWN_CHARS}}"
    except (ValueError, RecursionError):  # an integer of 5,000 digits
        return f"such a {type(value).__name__}"


def _problem(where: str, detail: ErrorDetails) -> Problem:
    field = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        return Problem(where, field, f"no such field; known are {', '.join(RenderSpec.model_fields)}")
    if detail["type"] == "string_pattern_mismatch" and field == "model":
        return Problem(where, field, "is not a model's name: letters, digits and . _ - / only")
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
    if detail["type"] in ("missing", "model_type"):
        return Problem(where, field, "is missing" if field else "is neither a prompt nor a spec")
    given = "" if detail["type"] == "value_error" else f", not {shown(detail['input'])}"
    return Problem(where, field, message + given)
