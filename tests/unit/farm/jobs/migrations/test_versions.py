"""The migrations form a single line, in the order of their file names."""

from pathlib import Path

from farm.jobs import migrations
from farm.jobs.database import _scripts


def test_the_migrations_follow_each_other_as_their_files_do() -> None:
    newest_first = list(_scripts().walk_revisions())
    files = sorted((Path(migrations.__file__).parent / "versions").glob("*.py"), reverse=True)
    assert [Path(revision.path) for revision in newest_first] == files
    assert [revision.revision for revision in newest_first] == [path.name.partition("_")[0] for path in files]
    older = [revision.revision for revision in newest_first[1:]]
    assert [revision.down_revision for revision in newest_first] == [*older, None]
