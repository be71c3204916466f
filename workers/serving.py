"""One worker process, on one device: its models loaded, then Celery's messages until it is told to stop."""

import os
import signal
import socket
import sys
from typing import Any

from celery import signals

from farm.broker import make_app, queue_name
from farm.errors import FarmError
from farm.log import configure
from farm.settings import Settings
from workers import tasks
from workers.consumption import HeldFirst, UrgentConsumer
from workers.lifecycle import Worker, attach


def serve(name: str | None, given: dict[str, Any]) -> None:
    """Load the models, then render until told to stop; `given` are the settings that the command line names.

    The process ends with 2 where another start would end the same way, and with 3 where it may not.
    """
    nodename = f"{name or f'worker-{os.getpid()}'}@{socket.gethostname()}"
    configure()
    # Until Celery listens itself, a stop ends the loading; nothing is claimed yet.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = Settings.load(**given)
        worker = Worker(settings, nodename)
        worker.build()
    except KeyboardInterrupt:
        sys.exit(130)
    except FarmError as error:
        print(f"farm worker: {error}", file=sys.stderr)
        sys.exit(3 if error.retryable else 2)

    app = make_app(settings)
    app.conf.worker_pool = "workers.pool:TaskPool"
    app.conf.worker_consumer = "workers.arrival:CheckedConsumer"
    app.conf.worker_enable_remote_control = True
    order = HeldFirst(lambda: worker.pins.held, lambda: worker.pins.failures)
    app.conf.broker_transport_options["queue_order_strategy"] = order
    app.steps["consumer"].add(UrgentConsumer)
    signals.setup_logging.connect(lambda **_: None, weak=False)  # ours stands already
    tasks.register(app, worker)
    attach(app, worker)
    app.worker_main(
        [
            "worker",
            f"--hostname={nodename}",
            f"--queues={','.join(queue_name(model) for model in worker.pins.names)}",
            # More threads than slots: while some render, others encode and upload, and one waits to join.
            f"--concurrency={worker.engine.slots + max(2, worker.engine.slots // 2)}",
            "--without-mingle",
            "--without-gossip",
            "--task-events",
        ]
    )
