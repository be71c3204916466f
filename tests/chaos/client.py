"""`python -m tests.chaos.client`: a client that submits one batch after another, through crashes and outages.

After a restart it resubmits every batch it has no answer for, under the same idempotency key. With `--break-off` it
stops in the middle of a large submission instead and waits to be killed.
"""

import argparse
import itertools
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from farm.client.farm import Farm
from farm.errors import ServiceUnavailable
from farm.log import configure
from farm.specs.spec import RenderSpec
from tests.chaos.orders import Journal, Order, Scale, order

LARGE = 4001
"""Number of specs in an interrupted submission: large enough that only a part is in SQL when the client stops."""
_POLL_SECONDS = 0.1


def hand_in(farm: Farm, wanted: Order, journal: Journal) -> bool:
    """Submit or resubmit an order, with its name as the key. False if a service was away and the outcome is unknown."""
    journal.write("asks", wanted.name, priority=wanted.priority)
    try:
        batch = farm.submit(
            wanted.specs, name=wanted.name, owner=wanted.owner, priority=wanted.priority, key=wanted.name
        )
    except ServiceUnavailable as error:
        journal.write("unsure", wanted.name, why=type(error).__name__)
        return False
    journal.write("has", wanted.name, batch=batch.id, jobs=batch.total)
    return True


def submit_on(seed: int, scale: Scale, journal: Journal, enough: Path) -> None:
    """Submit orders until `scale.jobs` jobs are submitted and the file `enough` exists."""
    told, asked = journal.names("has"), journal.names("asks")
    submitted, pause = 0, threading.Event()
    with _open() as farm:
        for number in itertools.count():
            wanted = order(seed, f"order-{number}", scale)
            while wanted.name not in told:
                # A submission without an answer may have been accepted: resubmit it until the answer is known.
                if wanted.name not in asked and submitted >= scale.jobs and enough.exists():
                    return
                if _room(farm, scale):
                    asked.add(wanted.name)
                    if hand_in(farm, wanted, journal):
                        break
                pause.wait(_POLL_SECONDS)
            submitted += len(wanted.specs)


def _open() -> Farm:
    while True:
        try:
            return Farm()
        except ServiceUnavailable:
            threading.Event().wait(_POLL_SECONDS)


def _room(farm: Farm, scale: Scale) -> bool:
    try:
        return sum(farm.waiting().values()) < scale.backlog
    except ServiceUnavailable:
        return False


def break_off(name: str, journal: Journal) -> None:
    """Stop in the middle of a submission, note it in the journal, and wait to be killed."""

    def specs() -> Iterator[RenderSpec]:
        for index in range(1, LARGE):
            yield RenderSpec(prompt=f"{name} {index}", seed=index)
        journal.write("halfway", name)
        signal.pause()

    with _open() as farm:
        journal.write("breaks", name)
        farm.submit(specs(), name=name, owner="eve")


def main() -> None:
    """Submit as the command line says, to the farm configured in the environment."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=Scale.loads)
    parser.add_argument("--enough", type=Path)
    parser.add_argument("--break-off", metavar="NAME")
    args = parser.parse_args()
    configure()
    journal = Journal(args.journal)
    if args.break_off:
        break_off(args.break_off, journal)
        return
    submit_on(args.seed, args.scale, journal, args.enough)


if __name__ == "__main__":
    main()
