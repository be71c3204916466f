"""Pictures that are too large for all workers that are there, in SQL."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import sqlalchemy as sa

from farm.jobs.memory import Room, room_of
from farm.jobs.schema import JobRow


def fits(room: Room) -> sa.ColumnElement[bool]:
    """`Room.has` of a job's spec, in SQL."""
    width, height = (JobRow.spec[name].as_integer() for name in ("width", "height"))
    guided = (JobRow.spec[name].as_float() > 1 for name in ("guidance_scale", "true_cfg_scale"))
    rows = sa.case((sa.or_(*guided), 2), else_=1)
    own = sa.and_(width.is_(None), height.is_(None))
    return sa.and_(
        sa.or_(~own, rows <= room.own_rows),
        sa.func.coalesce(width * height, 0) * rows <= room.most,
    )


def rooms(workers: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, Room]:
    """What any of the workers has room for, by model, given the models that each serves.

    A model is left out while one of its workers has not found that out.
    """
    found: dict[str, Room] = {}
    unknown: set[str] = set()
    for models in workers:
        for model in models:
            name = model["name"]
            if (room := room_of(model)) is None:
                unknown.add(name)
            else:
                other = found.get(name, Room(0, 0))
                found[name] = Room(max(room.most, other.most), max(room.own_rows, other.own_rows))
    return {name: room for name, room in found.items() if name not in unknown}
