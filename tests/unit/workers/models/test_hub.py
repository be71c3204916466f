"""Models of a hub that is down, refuses requests, or breaks connections: a local hub over real connections."""

import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import pytest

from farm.errors import ModelError, ModelUnavailable
from workers.models.checkpoints import open_checkpoint


class Hub(ThreadingHTTPServer):
    """A hub that answers every request with one status, or closes the connection."""

    status: int | None = 200
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if self.server.status is None:
            self.connection.close()
            return
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(OSError, ValueError):  # the connection was broken
            super().handle()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    yield hub
    hub.shutdown()
    thread.join()
    hub.server_close()


@pytest.mark.parametrize("status", [500, 503, 429, 408, None])
def test_a_hub_that_is_away_for_a_while_makes_no_wrong_model(hub: Hub, status: int | None) -> None:
    hub.status = status
    with pytest.raises(ModelUnavailable, match="can't download 'org/name' from the hub") as raised:
        open_checkpoint("org/name", {})
    assert raised.value.retryable


def test_an_unreachable_hub_makes_a_model_unavailable_not_invalid(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(ModelUnavailable):
        open_checkpoint("org/name", {})


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_model_that_the_hub_does_not_hand_out_is_wrong(hub: Hub, status: int) -> None:
    hub.status = status
    with pytest.raises(ModelError) as raised:
        open_checkpoint("org/name", {})
    assert not raised.value.retryable


def test_a_model_that_is_not_here_while_the_hub_is_not_to_be_asked_is_wrong(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as raised:
        open_checkpoint("org/name", {})
    assert not raised.value.retryable
