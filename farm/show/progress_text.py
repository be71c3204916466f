"""Progress as text: bars of block characters, rates, durations."""

from farm.jobs.tempo import Tempo

_BAR = 12


def blocks(fraction: float, width: int = _BAR) -> tuple[str, str]:
    """The full and the empty part of a bar; full only if all is done."""
    full = min(max(0, int(fraction * width + 0.5)), width if fraction >= 1 else width - 1)
    return "█" * full, "░" * (width - full)


def steps_line(steps_done: int, steps: int) -> str:
    """`███████░░░░░ 60% step 12/20`."""
    return f"{_share(steps_done, steps)} step {steps_done}/{steps}"


def jobs_line(ended: int, total: int, speed: Tempo, note: str = "") -> str:
    """`████░░░░░░░░ 312/1000 31% 4.2/s ETA 2m 44s`, and a note."""
    full, empty = blocks(ended / max(1, total))
    parts = (f"{full}{empty} {ended}/{total} {_percent(ended, total)}", tempo_line(speed), note)
    return " ".join(filter(None, parts))


def _share(done: int, of: int) -> str:
    full, empty = blocks(done / max(1, of))
    return f"{full}{empty} {_percent(done, of)}"


def _percent(done: int, of: int) -> str:
    return f"{100 * done // max(1, of)}%"


def rate(per_second: float) -> str:
    """`4.2/s`; slower rates are `2.5/min` or `3.1/h`."""
    for unit, seconds in (("s", 1), ("min", 60)):
        if per_second * seconds >= 1:
            return f"{per_second * seconds:.{0 if per_second * seconds >= 100 else 1}f}/{unit}"
    return f"{per_second * 3600:.1f}/h"


def duration(seconds: float) -> str:
    """`45s`, `2m 44s`, `3h 05m`, `2d 03h`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02}s"
    if whole < 48 * 3600:
        return f"{whole // 3600}h {whole % 3600 // 60:02}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02}h"


def tempo_line(tempo: Tempo) -> str:
    """`4.2/s ETA 2m 44s`, without unknown parts."""
    parts = (
        rate(tempo.per_second) if tempo.per_second is not None else "",
        f"ETA {duration(tempo.eta_seconds)}" if tempo.eta_seconds is not None else "",
    )
    return " ".join(filter(None, parts))
