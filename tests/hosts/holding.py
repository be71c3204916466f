"""`python -m tests.hosts.holding`: a dispatcher that never finishes its pass."""

import signal

from farm.jobs import backlog
from farm.jobs.database import Database
from farm.settings import Settings


def main() -> None:
    """Take the dispatch lock, print a line, and wait to be killed."""
    db = Database(Settings.load().database_url)
    with db.write() as session:
        db.exclusive(session, backlog._DISPATCH_LOCK)
        print("holds the lock", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
