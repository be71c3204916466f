"""A worker sends task events together."""

from types import SimpleNamespace

from celery import Celery
from kombu import Queue
from kombu.asynchronous import Hub
from kombu.transport.virtual.base import BrokerState

from workers.consumer.reporter import Reporter


def test_events_of_several_tasks_are_one_message() -> None:
    app = Celery("test", broker="memory://", set_as_current=False)
    with app.connection_for_write() as connection:
        # By default all in-memory connections of a process share this state, and with it the queues of earlier tests.
        connection.transport.state = BrokerState()
        events = app.events.Dispatcher(connection, hostname="w1@host", buffer_group=["task"])
        seen = Queue("seen", events.exchange, routing_key="#")(connection.default_channel)
        seen.declare()
        consumer = SimpleNamespace(hub=Hub(), event_dispatcher=events)
        Reporter(consumer).start(consumer)
        for number in range(3):
            events.send("task-started", uuid=f"b-{number}")
        assert seen.get() is None
        loop = consumer.hub.create_loop()
        while (message := seen.get()) is None:
            next(loop)
        assert [event["uuid"] for event in message.payload] == ["b-0", "b-1", "b-2"]
        events.send("task-succeeded", uuid="b-0")
        while (message := seen.get()) is None:
            next(loop)
        assert [event["type"] for event in message.payload] == ["task-succeeded"]
        consumer.hub.close()
