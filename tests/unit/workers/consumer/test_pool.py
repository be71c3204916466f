"""A task that ends wakes the loop that fetches the next one, also after an outage of Redis."""

import threading

from kombu.asynchronous import Hub, get_event_loop, set_event_loop

from tests.gated import SOON
from workers.consumer.pool import TaskPool


def test_the_loop_is_woken_by_a_task_that_ends_after_a_lost_connection_too() -> None:
    hub, woken, before = Hub(), threading.Event(), get_event_loop()
    pool = TaskPool(1)
    pool.register_with_event_loop(hub)
    hub.reset()  # Celery does this after an outage of Redis; from then on kombu has no current loop
    assert get_event_loop() is None
    hub.call_soon = lambda *_: woken.set()
    pool.on_apply(lambda *_, **__: None, (), {}, callback=lambda _: None, accept_callback=lambda *_: None)
    assert woken.wait(SOON)
    pool.executor.shutdown()
    hub.close()
    set_event_loop(before)
