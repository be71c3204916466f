"""When a model's pictures are guided, and the factor of memory and time that guidance takes."""

from dataclasses import dataclass

from farm.specs.spec import RenderSpec


@dataclass(frozen=True)
class Guidance:
    """The classifier-free guidance of a model family (Ho & Salimans 2022).

    A family publishes it, so that programs without the model can estimate memory and time. By default no picture is
    guided.
    """

    field: str = ""
    """The spec's field that holds the scale, such as `guidance_scale`."""
    above: float = 1.0
    """A picture is guided if its scale is larger than this."""
    requires: str = ""
    """A text field that must not be empty either, such as `negative_prompt`."""
    factor: int = 2
    """By how much guidance multiplies the memory and the time of a picture."""

    def factor_of(self, spec: RenderSpec) -> int:
        """The factor of a picture's memory and time: 1 without guidance, and for fields that this version lacks."""
        scale = getattr(spec, self.field, None) if self.field else None
        guided = isinstance(scale, int | float) and scale > self.above
        if self.requires:
            guided = guided and bool(getattr(spec, self.requires, ""))
        return self.factor if guided else 1

    def scale_of(self, spec: RenderSpec) -> float:
        """The scale that guides a picture; 1 if it is not guided."""
        return float(getattr(spec, self.field)) if self.factor_of(spec) > 1 else 1.0


UNGUIDED = Guidance()
"""No picture is guided."""
