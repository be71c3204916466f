"""`python -m workers`: one worker, on one device. `farm worker` runs this."""

import argparse
import os
import signal
import socket
import sys

from celery import signals

from farm.broker import make_app, queue_name
from farm.errors import FarmError
from farm.log import configure
from farm.settings import Settings
from workers import tasks
from workers.consumption import HeldFirst, UrgentConsumer
from workers.lifecycle import Worker, attach


def main() -> None:
    """Load the models, then render until told to stop."""
    parser = argparse.ArgumentParser(prog="farm worker", description="Render the jobs of the models it pins.")
    parser.add_argument("--name", help="what Flower calls it (default: worker-PID)")
    parser.add_argument("--models", help="what to pin: name=source,… (FARM_MODELS)")
    parser.add_argument("--device", help="cuda, cuda:1, cpu (FARM_DEVICE; default: what is there)")
    parser.add_argument("--dtype", help="float32, bfloat16, float16 (FARM_DTYPE; default: what fits the device)")
    parser.add_argument("--slots", type=int, help="requests rendered at once (FARM_SLOTS)")
    args = vars(parser.parse_args())
    name = f"{args.pop('name') or f'worker-{os.getpid()}'}@{socket.gethostname()}"
    configure()
    # Until Celery listens itself, a stop ends the loading; nothing is claimed yet.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        settings = Settings.load(**{key: value for key, value in args.items() if value is not None})
        worker = Worker(settings, name)
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
            f"--hostname={name}",
            f"--queues={','.join(queue_name(model) for model in worker.pins.names)}",
            # More threads than slots: while some render, others encode and upload, and one waits to join.
            f"--concurrency={worker.engine.slots + max(2, worker.engine.slots // 2)}",
            "--without-mingle",
            "--without-gossip",
            "--task-events",
        ]
    )


if __name__ == "__main__":
    main()
