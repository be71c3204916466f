"""`python -m farm.flower`: Flower on the farm's broker, with readable rows. `FLOWER_*` configures it."""

import logging
import signal
import sys

from farm.errors import FarmError, NotConfigured
from farm.log import configure
from farm.queue.broker import make_app
from farm.settings import Settings

TASKS_COLUMNS = "name,state,kwargs,result,worker,runtime,received,started,uuid"
"""kwargs contains a render's batch, index and prompt; result contains its bar, and later its picture's address."""


def main() -> None:
    """Serve Flower until SIGTERM, with its state saved in `FLOWER_DB`.

    It refuses to run without a password: any visitor of Flower can stop the workers.
    """
    # Imported late: Flower's import defines its options in a process-wide registry.
    from flower.app import Flower
    from flower.command import apply_env_options, extract_settings
    from flower.options import options
    from flower.urls import settings as web_settings

    configure()
    for name in ("tornado.access", "flower.inspector"):  # the latter warns while no worker runs
        logging.getLogger(name).setLevel(logging.ERROR)
    options.address = "127.0.0.1"
    options.tasks_columns = TASKS_COLUMNS
    options.persistent = True
    options.state_save_interval = 5000
    apply_env_options()
    try:
        if not (options.basic_auth or options.auth):
            raise NotConfigured("Flower needs a password: FLOWER_BASIC_AUTH=user:password")
        app = make_app(Settings.load())
    except FarmError as error:
        print(f"farm flower: {error}", file=sys.stderr)
        sys.exit(2)
    extract_settings()
    monitor = Flower(capp=app, options=options, **web_settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: monitor.io_loop.add_callback_from_signal(monitor.stop))
    monitor.start_http_server()
    monitor.start()


if __name__ == "__main__":
    main()
