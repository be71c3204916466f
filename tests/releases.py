"""Other releases of the farm in folders of their own: the previous one from git, and a next one made from this tree."""

import io
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import farm
import workers
from farm.jobs.database import _scripts

ROOT = Path(__file__).parents[1]
PREVIOUS = "90b196f"
"""The commit of the release before this one."""
PREVIOUS_VERSION, NEXT_VERSION = f"0.1.0+{PREVIOUS}", "999.0"
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
    """A release whose `python -m farm` and `python -m workers` run in its folder."""

    folder: Path
    version: str

    @property
    def env(self) -> dict[str, str]:
        """The environment variables for its programs."""
        return {"PYTHONPATH": str(self.folder)}


@dataclass(frozen=True)
class NextRelease(Release):
    """A release with one more migration than this tree."""

    revision: str
    """The revision of its schema."""


def this_release() -> Release:
    """The release of this tree."""
    return Release(ROOT, farm.__version__)


def previous_release(folder: Path) -> Release:
    """Write the previous release into a new folder; fails the test if git does not have its commit."""
    archive = subprocess.run(
        ["git", "archive", PREVIOUS, "farm", "workers"], cwd=ROOT, capture_output=True, check=False
    )
    if archive.returncode:
        pytest.fail(
            f"git has no commit {PREVIOUS}, the previous release: fetch the whole history "
            f"(git fetch --unshallow) ({archive.stderr.decode(errors='replace').strip()})",
            pytrace=False,
        )
    folder.mkdir()
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as packed:
        packed.extractall(folder, filter="data")
    _name(folder, PREVIOUS_VERSION)
    return _checked(Release(folder, PREVIOUS_VERSION))


def next_release(folder: Path) -> NextRelease:
    """Write a next release into a new folder: this tree's packages with one more migration."""
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
    _name(folder, NEXT_VERSION)
    return NextRelease(folder, NEXT_VERSION, revision)


def _name(folder: Path, version: str) -> None:
    """Write the metadata that gives the packages in a folder a version, as their installation would."""
    info = folder / f"diffusion_farm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: diffusion-farm\nVersion: {version}\n")


def _checked(release: Release) -> Release:
    """Return the release after checking that its programs import its own packages and not this tree's."""
    found = subprocess.run(
        [sys.executable, "-c", "import farm, workers; print(farm.__version__, farm.__file__, workers.__file__)"],
        cwd=release.folder,
        env={**os.environ, **release.env},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    packages = [str(release.folder / name / "__init__.py") for name in ("farm", "workers")]
    assert found == [release.version, *packages], found
    return release
