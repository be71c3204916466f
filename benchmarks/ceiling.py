"""How much of this machine a full forward gets, and how much the first goal would take."""

from dataclasses import dataclass

PRODUCT_SIDE = 2048
"""Of the square matrices whose product shows what the machine can do."""


@dataclass(frozen=True)
class FullForward:
    """The largest forward of one kind of request."""

    requests: int
    rows: int
    flop: int
    """Of its matrix products, convolutions and attention; all else comes on top."""
    seconds: float

    @property
    def rate(self) -> float:
        """FLOP a second."""
        return self.flop / self.seconds


def ceiling(forward: FullForward, steps: int, serial_rate: float, goal: float, product_rate: float) -> str:
    """One line: what the forward reached, what torch's own product reaches, and what `goal` times serial asks for."""
    # With everything but the forwards for nothing.
    longest = forward.requests / (goal * serial_rate * steps)
    return (
        f"ceiling of row 1: a full forward ({forward.rows} rows) is at least {forward.flop / 1e9:.2f} GFLOP and took "
        f"{1000 * forward.seconds:.0f} ms, so {forward.rate / 1e9:.0f} GFLOP/s; torch's {PRODUCT_SIDE}x{PRODUCT_SIDE} "
        f"product reaches {product_rate / 1e9:.0f} in this precision on these threads; {goal:g} times this serial rate "
        f"leaves a forward {1000 * longest:.0f} ms at most, so asks for {forward.flop / longest / 1e9:.0f} GFLOP/s"
    )
