"""The farm's next release: its packages as they are, under another version, with one migration more."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import farm
import workers
from farm.jobs.database import _scripts

VERSION = "999.0"
_MIGRATION = '''"""A column more, which programs that are older leave alone."""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = "{head}"
branch_labels = None
depends_on = None
serves_from = "{head}"


def upgrade() -> None:
    op.add_column("jobs", sa.Column("next_note", sa.Text(), nullable=True))
'''
_COLUMN = """

JobRow.next_note = sa.orm.mapped_column(sa.Text, nullable=True)
"""


@dataclass(frozen=True)
class Release:
    """A release of the farm in a folder of its own."""

    folder: Path
    """Where `python -m farm` and `python -m workers` are this release's."""
    revision: str
    """Of its schema."""
    before: str
    """Of the schema before."""

    @property
    def env(self) -> dict[str, str]:
        """What a program of it needs in its environment."""
        return {"PYTHONPATH": str(self.folder)}


def make(folder: Path) -> Release:
    """Write the next release into a new folder."""
    folder.mkdir()
    for package in (farm, workers):
        there = Path(package.__file__ or "").parent
        shutil.copytree(there, folder / there.name, ignore=shutil.ignore_patterns("__pycache__"))
    head = _scripts().get_current_head()
    assert head is not None
    revision = f"{int(head) + 1:04d}"
    migration = folder / "farm" / "jobs" / "migrations" / "versions" / f"{revision}_next.py"
    migration.write_text(_MIGRATION.format(revision=revision, head=head))
    with (folder / "farm" / "jobs" / "schema.py").open("a") as schema:
        schema.write(_COLUMN)
    told = folder / f"diffusion_farm-{VERSION}.dist-info"
    told.mkdir()
    (told / "METADATA").write_text(f"Metadata-Version: 2.1\nName: diffusion-farm\nVersion: {VERSION}\n")
    return Release(folder, revision, head)
