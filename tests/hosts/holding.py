"""`python -m tests.hosts.holding`: a dispatcher in the middle of a pass, which it never ends."""

import signal

from farm.jobs import backlog
from farm.jobs.database import Database
from farm.settings import Settings


def main() -> None:
    """Take the lock of all passes, say so, and wait."""
    db = Database(Settings.load().database_url)
    with db.write() as session:
        db.exclusive(session, backlog._DISPATCH_LOCK)
        print("holds the lock", flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
