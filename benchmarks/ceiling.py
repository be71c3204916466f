"""The share of the machine's throughput that a full forward reaches, and the share that the first goal needs."""

from dataclasses import dataclass

PRODUCT_SIDE = 2048
"""The side of the square matrices whose product measures the machine's throughput."""


@dataclass(frozen=True)
class FullForward:
    """The largest forward of one kind of request."""

    requests: int
    rows: int
    flop: int
    """FLOP of matrix products, convolutions and attention only."""
    seconds: float

    @property
    def rate(self) -> float:
        """FLOP per second."""
        return self.flop / self.seconds


def ceiling(forward: FullForward, steps: int, serial_rate: float, goal: float, product_rate: float) -> str:
    """A line with the throughput of the forward, of torch's matrix product, and of `goal` times serial."""
    # Assumes that only forwards cost time.
    longest = forward.requests / (goal * serial_rate * steps)
    return (
        f"ceiling of row 1: a full forward ({forward.rows} rows) is at least {forward.flop / 1e9:.2f} GFLOP and took "
        f"{1000 * forward.seconds:.0f} ms, so {forward.rate / 1e9:.0f} GFLOP/s; torch's {PRODUCT_SIDE}x{PRODUCT_SIDE} "
        f"product reaches {product_rate / 1e9:.0f} in this precision on these threads; {goal:g} times this serial rate "
        f"leaves a forward {1000 * longest:.0f} ms at most, so asks for {forward.flop / longest / 1e9:.0f} GFLOP/s"
    )
