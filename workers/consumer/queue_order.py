"""The order of consumption: queues of loaded models first, and urgent messages even while the worker is busy."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from celery import bootsteps
from celery.worker import state
from kombu.common import ignore_errors
from kombu.utils.scheduling import round_robin_cycle

from farm.queue.broker import URGENT_STEP, queue_name


class HeldFirst:
    """kombu's `queue_order_strategy` of a worker: queues of loaded models first, so that few models are reloaded.

    `held` returns the loaded models, most recently used first, and `failed` those that can't be loaded. Queues of
    loaded models are served round robin, and so are the other queues, with two exceptions:
    - A model that is being loaded comes first, and the model that it will most likely evict comes after it. Otherwise
      the two could evict each other forever.
    - For every `rounds`-th message the queues of the other models come first, so that their jobs do not starve.

    Priority comes first: kombu's Redis transport checks every queue for an urgent message before it checks any for a
    less urgent message.
    """

    def __init__(
        self, held: Callable[[], Sequence[str]], failed: Callable[[], Collection[str]] = tuple, rounds: int = 32
    ) -> None:
        self.held = held
        self.failed = failed
        self.rounds = rounds

    def __call__(self) -> "_Cycle":
        """The order of a channel's queues; called by each new channel."""
        return _Cycle(self)

    def __json__(self) -> str:
        """The JSON form for Flower and `celery inspect stats`, which show the options of a worker's connection."""
        return type(self).__name__


class _Cycle(round_robin_cycle):  # type: ignore[type-arg]  # generic in its stubs only
    def __init__(self, order: HeldFirst) -> None:
        super().__init__()
        self._order = order
        self._taken = 0
        self._coming: str | None = None

    def consume(self, n: int) -> Any:
        """The queues, in the order in which kombu checks them for the next message."""
        held = [queue_name(model) for model in self._order.held()]
        if self._coming in [*held, *map(queue_name, self._order.failed())]:
            self._coming = None
        places = dict.fromkeys(held, 0)
        if self._coming is not None:
            if held:
                places[held[-1]] = 2
            places[self._coming] = 1
        others = -1 if self._taken % self._order.rounds == self._order.rounds - 1 else 3
        return sorted(super().consume(n), key=lambda queue: places.get(queue, others))

    def rotate(self, last_used: str) -> None:
        """Move the queue of a consumed message to the end of its group."""
        self._taken += 1
        if last_used not in [queue_name(model) for model in self._order.held()]:
            self._coming = last_used
        super().rotate(last_used)


class UrgentConsumer(bootsteps.StartStopStep):
    """Celery's bootstep that consumes only urgent messages, even while the ordinary consumer is paused.

    The ordinary consumer takes urgent messages too, and first. Each consumer is limited only by its own running tasks,
    and neither pauses the other: Redis may be sending the other an urgent message at that moment.

    It has its own connection, which Celery's loop serves and restarts like the ordinary one: within one
    connection, kombu delivers all messages of a queue to its last consumer.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        self._connection: Any = None
        self._consumer: Any = None
        self._taken: set[str] = set()

    def start(self, c: Any) -> None:
        """Start consuming; called with Celery's consumer whenever Celery has connected to Redis."""
        self._connection = c.connect()
        channel = self._connection.default_channel
        channel.priority_steps = [URGENT_STEP]
        # Every channel restores unacknowledged messages of dead workers: it must not make them urgent.
        channel.priority = c.task_consumer.channel.priority
        channel.qos.can_consume = lambda: self._under_way() < c.pool.limit
        handle = c.create_task_handler()

        def receive(message: Any) -> None:
            handle(message)
            request = state.requests.get(message.properties.get("correlation_id"))
            if request is not None:
                self._taken.add(request.id)
                # The ordinary consumer counts these, and urgent tasks must not use up its threads.
                state.reserved_requests.discard(request)

        self._consumer = c.app.amqp.TaskConsumer(channel, on_decode_error=c.on_decode_error)
        self._consumer.on_message = receive
        self._consumer.consume()

    def stop(self, _c: Any) -> None:
        """Stop consuming, until the next `start` if any; messages that arrive meanwhile go back to Redis."""
        if self._consumer is not None:
            ignore_errors(self._connection, self._consumer.cancel)
        if self._connection is not None:
            ignore_errors(self._connection, self._connection.close)
        self._connection = self._consumer = None

    def _under_way(self) -> int:
        self._taken = {task_id for task_id in self._taken if task_id in state.requests}
        return len(self._taken)
