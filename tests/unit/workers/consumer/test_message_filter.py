"""Closing a channel with unacknowledged messages after its connection was lost."""

from types import SimpleNamespace

from kombu import Connection

from workers.consumer.message_filter import CheckedTransport


def test_a_channel_closes_quietly_where_its_connection_is_gone() -> None:
    connection = Connection("redis://127.0.0.1:1/0", transport=CheckedTransport)
    transport = CheckedTransport(connection)
    channel = object.__new__(CheckedTransport.Channel)
    channel.__dict__.update(connection=transport, closed=False, _in_poll=False)
    qos = CheckedTransport.Channel.QoS(channel)
    qos._delivered["tag"] = SimpleNamespace()
    transport.client = None  # as kombu leaves it after the connection was closed
    qos.restore_unacked_once()
    assert not qos._delivered
