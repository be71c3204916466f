"""What to render: `RenderSpec`, its bounds and its hash."""

import hashlib
import reprlib
import secrets
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
"""A trajectory has a frame a step."""
MAX_PROMPT_CHARS = 20_000
MODEL_NAME = r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,199}$"
"""What a model may be called: a hub id (`org/name`) or a plain name. It becomes part of a queue's name."""
_SHOWN_CHARS = 80
URGENT = 90
"""From this priority on, of 0 to 100, a job is urgent: it waits neither for a worker's free thread nor for its slot."""


def draw_seed() -> int:
    """A seed nobody chose, drawn from the system's randomness."""
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
    # Steps that are out of bounds themselves are not in `data`, and complained about already.
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


Text = Annotated[str, Field(max_length=MAX_PROMPT_CHARS), AfterValidator(_storable)]
Size = Annotated[int | None, Field(ge=MIN_SIZE, le=MAX_SIZE), AfterValidator(_multiple_of_8)]


class TextOption:
    """Marks a field of `RenderSpec` that changes how a model embeds a text; None must be its default."""


class RenderSpec(BaseModel):
    """One picture, fully described; immutable, with diffusers' own parameter names.

    A spec always has a seed: one that is left out (or None) is drawn when the spec is made, so that the
    same spec always gives the same picture. `width`, `height` (pixels) and `scheduler` left out mean the
    model's own.
    `scheduler` is a name of `farm.specs.samplers` or diffusers' class name. An empty prompt draws unconditionally.

    Raises `pydantic.ValidationError`; `RenderSpec.parse` gives the farm's own error instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    prompt: Text
    negative_prompt: Text = ""
    num_inference_steps: int = Field(default=25, ge=1, le=MAX_STEPS)
    guidance_scale: float = Field(default=5.0, ge=0, le=1000)
    guidance_rescale: float = Field(default=0.0, ge=0, le=1)
    """How far the guided noise is scaled back against over-exposure (Lin et al. 2023, section 3.4)."""
    true_cfg_scale: float = Field(default=1.0, ge=1, le=1000)
    """Flux: real classifier-free guidance with the negative prompt, where `guidance_scale` is distilled; 1 is none."""
    clip_skip: Annotated[int | None, TextOption()] = Field(default=None, ge=1, le=23)
    """How many of CLIP's last layers are left out."""
    eta: float = Field(default=0.0, ge=0, le=1)
    """The share of noise that samplers with an eta (DDIM's, Song et al. 2020) add back at each step."""
    width: Size = None
    height: Size = None
    seed: int = Field(default_factory=draw_seed, ge=0, le=MAX_SEED)
    scheduler: Annotated[str | None, AfterValidator(_known_sampler)] = None
    model: str = Field(default="tiny", pattern=MODEL_NAME)
    deterministic: bool = False
    """Whether its bytes must not depend on what is rendered beside it; slower."""
    trajectory: Annotated[bool, AfterValidator(_of_few_steps)] = False
    """Whether the picture of every step is kept, as a film strip and an animation; at most 200 steps then."""

    @model_validator(mode="before")
    @classmethod
    def _unchosen(cls, values: Any) -> Any:
        # As good as left out: whoever stores the spec may draw it, and nothing else is the same work.
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

    def sha256(self) -> str:
        """The hash of what is asked for; equal specs have equal hashes, however they were written."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


TEXT_OPTIONS = tuple(
    name
    for name, field in RenderSpec.model_fields.items()
    if any(isinstance(mark, TextOption) for mark in field.metadata)
)
"""The fields that are marked as a `TextOption`."""

_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = 4 * _SHOWN_CHARS


def shown(value: object) -> str:
    """The beginning of a value, as a message says it; as little work however large it is."""
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
