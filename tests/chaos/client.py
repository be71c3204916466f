"""`python -m tests.chaos.client`: a client that hands in batch after batch, whatever happens to it or to the farm.

Killed and started again, it goes on: what it did not live to hear the answer to, it hands in once more, under the
same key. With `--break-off` it stops in the middle of a large submission instead, and waits there to be killed.
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
"""Specs of a submission that is broken off: some of it is in SQL by then, and some not."""
_POLL_SECONDS = 0.1


def hand_in(farm: Farm, wanted: Order, journal: Journal) -> bool:
    """Submit an order, if need be once more: its key is its name. False if a service is away, and nobody knows."""
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
    """Submit order after order until there are enough of them, both by number and by word."""
    told, asked = journal.names("has"), journal.names("asks")
    submitted, pause = 0, threading.Event()
    with _open() as farm:
        for number in itertools.count():
            wanted = order(seed, f"order-{number}", scale)
            while wanted.name not in told:
                # What was asked for and not answered may be in: it is to be handed in until that is known.
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
    """Stop in the middle of a submission, say so, and wait for the end."""

    def specs() -> Iterator[RenderSpec]:
        for index in range(1, LARGE):
            yield RenderSpec(prompt=f"{name} {index}", seed=index)
        journal.write("halfway", name)
        signal.pause()

    with _open() as farm:
        journal.write("breaks", name)
        farm.submit(specs(), name=name, owner="eve")


def main() -> None:
    """Submit as told by the command line, to the farm that the environment names."""
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
