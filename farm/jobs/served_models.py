"""A worker's report on its models and its device's memory, and its form in the table `workers`."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

from farm.specs.guidance import Guidance
from farm.specs.spec import RenderSpec

_GUIDANCE_UNTIL_0005 = Guidance("guidance_scale")
"""How workers before migration 0007 count the pixels of every model's pictures."""


class DeviceMemory(NamedTuple):
    """The memory of a worker's device, in bytes."""

    used: int
    total: int


@dataclass(frozen=True)
class MemoryLimit:
    """The largest picture of a model that may fit into a worker's memory: larger ones do not."""

    pixels: int
    """The most pixels of a picture, times its guidance's factor."""
    native_factor: int
    """The largest factor for a picture of the model's own size, which a spec without width and height has."""
    guidance: Guidance

    @classmethod
    def below(cls, cost: int, native_pixels: int, guidance: Guidance) -> Self:
        """The limit where a picture of `cost` (pixels times factor) does not fit; `native_pixels`: the model's size."""
        return cls(cost - 1, (cost - 1) // native_pixels, guidance)

    def allows(self, spec: RenderSpec) -> bool:
        """Whether a picture may fit. True if only one side is given, since only the worker knows the other."""
        factor = self.guidance.factor_of(spec)
        if spec.width is None and spec.height is None:
            return factor <= self.native_factor
        return spec.width is None or spec.height is None or spec.width * spec.height * factor <= self.pixels

    def lowered_to(self, other: Self) -> Self:
        """The limit for pictures that both limits of a worker allow."""
        least = min(self.pixels, other.pixels), min(self.native_factor, other.native_factor)
        return type(self)(*least, self.guidance)

    def raised_to(self, other: Self) -> Self:
        """The limit for pictures that the limit of either worker allows."""
        most = max(self.pixels, other.pixels), max(self.native_factor, other.native_factor)
        return type(self)(*most, self.guidance)


@dataclass(frozen=True)
class ServedModel:
    """A model that a worker serves."""

    name: str
    loaded: bool = False
    """Whether it is on the device now."""
    sha256: str | None = None
    """The hash of its weights; None, as with the next three, until the worker has loaded it once."""
    bytes: int | None = None
    """Device memory of its parameters."""
    family: str | None = None
    """diffusers' class name of its pipeline."""
    samplers: str | None = None
    """`diffusion` or `flow`: which recipe of a `farm.specs.samplers.Sampler` it takes; "" for none."""
    guidance: Guidance | None = None
    """When its pictures are guided; None while the worker does not know."""
    limit: MemoryLimit | None = None
    """The largest picture that may fit; None while the worker does not know, or if every picture may."""


def served_columns(models: Iterable[ServedModel], memory: DeviceMemory | None) -> dict[str, Any]:
    """The values of a worker's columns `models`, `memory_used` and `memory_total`."""
    return {
        "models": [_to_json(model, memory) for model in models],
        "memory_used": memory and memory.used,
        "memory_total": memory and memory.total,
    }


def served_models(column: Iterable[Mapping[str, Any]]) -> tuple[ServedModel, ...]:
    """The models in a worker's column `models`, written by any release."""
    return tuple(_from_json(entry) for entry in column)


def device_memory(used: int | None, total: int | None, models: Iterable[Mapping[str, Any]]) -> DeviceMemory | None:
    """A device's memory, from all three columns: workers before migration 0007 write it into each model's entry."""
    if used is not None and total is not None:
        return DeviceMemory(used, total)
    return next((DeviceMemory(*map(int, entry["memory"])) for entry in models if "memory" in entry), None)


def _to_json(model: ServedModel, memory: DeviceMemory | None) -> dict[str, Any]:
    plain = ("sha256", "bytes", "family", "samplers")
    entry = {name: value for name in plain if (value := getattr(model, name)) is not None}
    entry |= {"name": model.name, "held": model.loaded}
    if model.guidance is not None:
        entry["guidance"] = asdict(model.guidance)
    if model.limit is not None:
        entry["limit"] = asdict(model.limit)
    return entry | _until_0005(model, memory)


def _until_0005(model: ServedModel, memory: DeviceMemory | None) -> dict[str, Any]:
    """The keys that clients and dispatchers before migration 0007 read: needed until `serves_from` is 0007 or later."""
    entry: dict[str, Any] = {} if memory is None else {"memory": list(memory)}
    if model.limit is not None:
        # They count a picture twice if `guidance_scale` or `true_cfg_scale` is above 1, whatever its family does: with
        # twice the limit they hold back no picture that fits.
        slack = 1 if model.limit.guidance == _GUIDANCE_UNTIL_0005 else 2
        entry["most_row_pixels"] = slack * model.limit.pixels
        entry["own_rows"] = slack * model.limit.native_factor
    return entry


def _from_json(entry: Mapping[str, Any]) -> ServedModel:
    limit = None
    if (said := entry.get("limit")) is not None:
        limit = MemoryLimit(said["pixels"], said["native_factor"], _guidance(said["guidance"]))
    elif (pixels := entry.get("most_row_pixels")) is not None:
        limit = MemoryLimit(pixels, entry.get("own_rows", _GUIDANCE_UNTIL_0005.factor), _GUIDANCE_UNTIL_0005)
    return ServedModel(
        name=entry["name"],
        loaded=bool(entry.get("held")),
        sha256=entry.get("sha256"),
        bytes=entry.get("bytes"),
        family=entry.get("family"),
        samplers=entry.get("samplers"),
        guidance=None if entry.get("guidance") is None else _guidance(entry["guidance"]),
        limit=limit,
    )


def _guidance(said: Mapping[str, Any]) -> Guidance:
    known = {field.name for field in fields(Guidance)}  # a later release may add fields
    return Guidance(**{name: value for name, value in said.items() if name in known})
