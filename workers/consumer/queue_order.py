"""Which message a worker takes next: from which model's queue, and urgent ones also while its threads are busy."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

from celery import bootsteps
from celery.worker import state
from kombu.common import ignore_errors
from kombu.utils.scheduling import round_robin_cycle

from farm.queue.broker import URGENT_STEP, queue_name


class HeldFirst:
    """kombu's `queue_order_strategy` of a worker: queues of held models come first, so that few models are reloaded.

    `held` names the models held now, most recently used first, and `failed` those that can't be loaded. Held ones take
    turns, and so do the others; but one that has begun to be loaded, because a message of it was taken, is next until
    it is held, and the held one that it will most likely replace comes after it: jobs of that one would only wait for
    it to be loaded again, and so would have the two replace each other for ever. For every `rounds`-th message the
    others come first, so that their jobs do not starve.

    Priority goes before all that: kombu's Redis transport looks into every queue for an urgent message before it looks
    into any for a less urgent one.
    """

    def __init__(
        self, held: Callable[[], Sequence[str]], failed: Callable[[], Collection[str]] = tuple, rounds: int = 32
    ) -> None:
        self.held = held
        self.failed = failed
        self.rounds = rounds

    def __call__(self) -> "_Cycle":
        """The order of one channel's queues; called by each channel when it is made."""
        return _Cycle(self)

    def __json__(self) -> str:
        """What Flower and `celery inspect stats` show: a worker sends them the options of its connection as JSON."""
        return type(self).__name__


class _Cycle(round_robin_cycle):  # type: ignore[type-arg]  # generic in its stubs only
    def __init__(self, order: HeldFirst) -> None:
        super().__init__()
        self._order = order
        self._taken = 0
        self._coming: str | None = None

    def consume(self, n: int) -> Any:
        """The queues, in the order in which the next message is looked for."""
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
        """Called with the queue that a message came from: it is the last of its kind to be looked into again."""
        self._taken += 1
        if last_used not in [queue_name(model) for model in self._order.held()]:
            self._coming = last_used
        super().rotate(last_used)


class UrgentConsumer(bootsteps.StartStopStep):
    """Celery's bootstep that takes urgent messages, and no others, also while the ordinary consumer is paused.

    The ordinary consumer takes urgent messages too, and first. What each may take depends only on what it took itself
    and has not ended: neither pauses the other, whose wait on Redis may be answered by an urgent message just then.

    It has a connection of its own, which Celery's loop serves and restarts like the ordinary one: within one, kombu
    delivers all messages of a queue to who consumed from it last.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, c: Any, **kwargs: Any) -> None:
        super().__init__(c, **kwargs)
        self._connection: Any = None
        self._consumer: Any = None
        self._taken: set[str] = set()

    def start(self, c: Any) -> None:
        """Begin to consume; called whenever Celery has connected to Redis, with its consumer."""
        self._connection = c.connect()
        channel = self._connection.default_channel
        channel.priority_steps = [URGENT_STEP]
        # What dead workers left unacknowledged is put back by any channel, and must not become urgent by that.
        channel.priority = c.task_consumer.channel.priority
        channel.qos.can_consume = lambda: self._under_way() < c.pool.limit
        handle = c.create_task_handler()

        def receive(message: Any) -> None:
            handle(message)
            request = state.requests.get(message.properties.get("correlation_id"))
            if request is not None:
                self._taken.add(request.id)
                # It uses up no thread of the ordinary consumer, which counts these.
                state.reserved_requests.discard(request)

        self._consumer = c.app.amqp.TaskConsumer(channel, on_decode_error=c.on_decode_error)
        self._consumer.on_message = receive
        self._consumer.consume()

    def stop(self, _c: Any) -> None:
        """End consuming, for good or until the next `start`; what arrives meanwhile goes back to Redis."""
        if self._consumer is not None:
            ignore_errors(self._connection, self._consumer.cancel)
        if self._connection is not None:
            ignore_errors(self._connection, self._connection.close)
        self._connection = self._consumer = None

    def _under_way(self) -> int:
        self._taken = {task_id for task_id in self._taken if task_id in state.requests}
        return len(self._taken)
