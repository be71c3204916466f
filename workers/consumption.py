"""Which model's queue a worker takes its next message from."""

from collections.abc import Callable, Collection
from typing import Any

from kombu.utils.scheduling import round_robin_cycle

from farm.broker import queue_name


class HeldFirst:
    """kombu's `queue_order_strategy` of a worker: queues of held models come first, so that few models are reloaded.

    `held` names the models held now. Held ones take turns, and so do the others. For every `rounds`-th message the
    others come first, so that their jobs do not starve. Priority goes before all that: kombu's Redis transport looks
    into every queue for an urgent message before it looks into any for a less urgent one.
    """

    def __init__(self, held: Callable[[], Collection[str]], rounds: int = 32) -> None:
        self.held = held
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

    def consume(self, n: int) -> Any:
        """The queues, in the order in which the next message is looked for."""
        held = {queue_name(model) for model in self._order.held()}
        others_first = self._taken % self._order.rounds == self._order.rounds - 1
        return sorted(super().consume(n), key=lambda queue: (queue in held) is others_first)

    def rotate(self, last_used: str) -> None:
        """Called with the queue that a message came from: it is the last of its kind to be looked into again."""
        self._taken += 1
        super().rotate(last_used)
