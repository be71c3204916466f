"""A worker process on one device: it loads its models, then consumes Celery's messages until SIGTERM."""

import logging
import os
import signal
import socket
import sys
import threading
from typing import Any

from celery import Celery, signals

from farm.errors import FarmError
from farm.log import configure
from farm.queue.broker import make_app, queue_name
from farm.settings import Settings
from workers.consumer import tasks
from workers.consumer.progress import ProgressBars
from workers.consumer.queue_order import HeldFirst, UrgentConsumer
from workers.consumer.reporter import Reporter
from workers.service.worker import Worker, build_worker


def serve(name: str | None, given: dict[str, Any]) -> None:
    """Load the models, then render until SIGTERM; `given` are the settings of the command line.

    The exit status is 2 if a restart cannot help, and 3 if it may.
    """
    nodename = f"{name or f'worker-{os.getpid()}'}@{socket.gethostname()}"
    configure()
    # Until Celery handles signals itself, SIGTERM ends the loading; nothing is claimed yet.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = Settings.load(**given)
        worker = build_worker(settings, nodename)
    except KeyboardInterrupt:
        sys.exit(130)
    except FarmError as error:
        print(f"farm worker: {error}", file=sys.stderr)
        sys.exit(3 if error.retryable else 2)

    app = make_app(settings)
    app.conf.worker_pool = "workers.consumer.pool:TaskPool"
    app.conf.worker_consumer = "workers.consumer.message_filter:CheckedConsumer"
    app.conf.worker_enable_remote_control = True
    order = HeldFirst(lambda: worker.pins.held, lambda: worker.pins.failures)
    app.conf.broker_transport_options["queue_order_strategy"] = order
    app.steps["consumer"].add(UrgentConsumer)
    signals.setup_logging.connect(lambda **_: None, weak=False)  # keep the farm's logging
    tasks.register(app, worker)
    attach(app, worker)
    app.worker_main(
        [
            "worker",
            f"--hostname={nodename}",
            f"--queues={','.join(queue_name(model) for model in worker.pins.names)}",
            # More threads than slots: some render, others encode and upload, and another job waits for a slot.
            f"--concurrency={worker.engine.slots + max(2, worker.engine.slots // 2)}",
            "--without-mingle",
            "--without-gossip",
            "--task-events",
        ]
    )


def attach(app: Celery, worker: Worker) -> None:
    """Start the worker when Celery consumes, drain it when Celery begins to stop, and stop it after Celery."""
    seconds = worker.settings.progress_seconds
    bars = ProgressBars(worker.leases.renders, seconds) if seconds is not None else None

    def ready(sender: Any, **_: object) -> None:
        worker.start()
        if bars is not None:
            bars.start(sender.reporter)

    def shutting_down(**_: object) -> None:
        # Celery sends this inside its signal handler and then waits for running tasks: draining ends them.
        threading.Thread(target=worker.drain, name="drain", daemon=True).start()

    def shut_down(**_: object) -> None:
        if bars is not None:
            bars.stop()
        worker.stop()

    app.steps["consumer"].add(Reporter)
    # The farm logs each transition where it is committed.
    for logger in ("celery.worker.strategy", "celery.app.trace"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    signals.worker_ready.connect(ready, weak=False)
    signals.worker_shutting_down.connect(shutting_down, weak=False)
    signals.worker_shutdown.connect(shut_down, weak=False)
