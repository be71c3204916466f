"""Compares the engine with diffusers' own pipeline: `python -m benchmarks.engine` prints a table at the end.

Both sides have the same checkpoint, specs and threads, take turns, and run in separate processes. The farm's side is
a worker without Celery and SQL, and without S3 except for the cost of checkpoints.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.apart import Apart
from benchmarks.baseline import Diffusers
from benchmarks.cases import Cases
from benchmarks.models import find, native_side
from benchmarks.ours import Farm
from benchmarks.parity import References
from benchmarks.rows import Row
from benchmarks.table import publish
from benchmarks.work import QUICK, Counts
from farm.errors import NotConfigured
from farm.local import LocalFarm
from farm.local.parts import require
from farm.settings import Settings

log = logging.getLogger("benchmarks")

NUMBERS = range(1, 9)
_UPLOADING = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table; 1 if a goal was missed, 2 if something is not installed."""
    options = _options(arguments)
    if _UPLOADING in options.only:
        try:
            require(worker=False, flower=False)
        except NotConfigured as error:
            print(f"row {_UPLOADING} uploads to a real S3 server: {error}", file=sys.stderr)
            return 2
    logging.basicConfig(format="%(relativeCreated)7d ms  %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    with tempfile.TemporaryDirectory(prefix="farm-benchmark-") as place:
        rows, facts = measure(options, Path(place))
    return publish("benchmarks.engine", arguments, rows, options.json, facts)


def measure(options: argparse.Namespace, place: Path) -> tuple[list[Row], list[str]]:
    """The requested rows, and facts about the run."""
    building = Apart(_Builder)  # its copy of the model goes with its process
    folder = building.find(options.model, place / "checkpoint", options.device, options.dtype)
    building.close()
    side = options.size or native_side(folder)
    common = folder, options.device, options.dtype, options.threads
    farm, diffusers = Apart(Farm, *common, options.slots, place / "sizes.json"), Apart(Diffusers, *common)
    try:
        counts = QUICK if options.quick else Counts()
        cases = Cases(farm, diffusers, side, sweep(side), counts, partial(object_store, place / "home"))
        comparing = Apart(References, *common[:3])  # its two copies of the model go with its process
        rows = [cases.parity(comparing)]
        comparing.close()
        for number in options.only:
            log.info("case %d", number)
            began = time.monotonic()
            rows.append(cases.run(number))
            log.info("   %s: %.2f%s (%.0f s)", rows[-1].what, rows[-1].value, rows[-1].unit, time.monotonic() - began)
        ceiling = cases.ceiling() if options.device == "cpu" else []
    finally:
        with ThreadPoolExecutor() as both:
            list(both.map(lambda one: (one.stop(), one.close()), (farm, diffusers)))
    facts = [
        *ceiling,
        f"{options.model}, {side}x{side}, {options.device}, {options.dtype}, {options.threads} threads, "
        f"{options.slots} slots",
        f"load {os.getloadavg()[0]:.1f} at the end",
    ]
    return rows, facts


def sweep(side: int) -> tuple[int, ...]:
    """Three sizes: from the small model's native size up, or up to a large model's native size."""
    base = side if side < 512 else side // 2
    return base, base * 3 // 2 // 8 * 8, base * 2


@contextmanager
def object_store(home: Path) -> Iterator[Settings]:
    """The embedded farm's S3 server with an empty bucket, while the block runs."""
    with LocalFarm(home, workers=0, dispatcher=False, flower=False) as farm:
        yield farm.settings


class _Builder:
    find = staticmethod(find)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument(
        "--device", default="cpu", help="Device to compute on: cpu, cuda or cuda:1 (default: %(default)s)."
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="Data type to compute in (default: float32 on a CPU, else bfloat16).",
    )
    parser.add_argument(
        "--model",
        default="tiny",
        help="Model: tiny (the default), sd15-random, sdxl-random (:10 for a tenth of the widths), or a folder.",
    )
    parser.add_argument("--size", type=int, help="Width and height in pixels (default: the model's own).")
    parser.add_argument(
        "--slots", type=int, default=16, help="Number of requests to render at once (default: %(default)s)."
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="Number of threads of each side (default: one for each core).",
    )
    parser.add_argument("--quick", action="store_true", help="Measure less of everything: plausible, not exact.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="File to write the rows to as JSON.")
    parser.add_argument(
        "--only",
        type=_numbers,
        default=list(NUMBERS),
        metavar="1,3",
        help=f"Cases to measure, from {NUMBERS.start} to {NUMBERS.stop - 1}; all if omitted.",
    )
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    return options


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if not set(numbers) <= set(NUMBERS):
        raise argparse.ArgumentTypeError(f"cases are {NUMBERS.start} to {NUMBERS.stop - 1}")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
