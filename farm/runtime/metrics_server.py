"""Where Prometheus finds a process of the farm: a small HTTP server for its metrics, and which address others see."""

import http
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import ThreadingMixIn
from typing import Any, Protocol
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from farm.errors import NotConfigured
from farm.settings import Settings

METRICS = "/metrics"
_REQUEST_SECONDS = 10
_ANYWHERE = {"0.0.0.0", "::", ""}  # noqa: S104


class Service(Protocol):
    """What a process of the farm stands on."""

    outages: int
    """How often it did not answer."""


class Exposition:
    """An HTTP server that answers `/metrics` from a registry, and further paths if there are any.

    It listens from the first; what it knows is asked of it only when it has started. Raises `NotConfigured` if its
    port is taken.
    """

    def __init__(
        self, settings: Settings, registry: CollectorRegistry, more: Mapping[str, WSGIApplication] | None = None
    ) -> None:
        host, port = settings.metrics_host, settings.metrics_port or 0
        pages = {METRICS: make_wsgi_app(registry), **(more or {})}
        try:
            self._server = _server(host, port)
        except OSError as error:
            raise NotConfigured(
                f"no metrics at {host}:{port}: {error.strerror or error}; set FARM_METRICS_PORT to another one, "
                "to 0 for any, or to none"
            ) from error
        self._server.set_app(_pages(pages))
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self.port: int = self._server.server_port
        seen_as = _own_address(settings.broker_url) if host in _ANYWHERE else host
        self.url = f"http://{f'[{seen_as}]' if ':' in seen_as else seen_as}:{self.port}{METRICS}"
        """Where others find the metrics."""

    def start(self) -> None:
        """Answer from now on, in threads of its own."""
        self._thread.start()

    def close(self) -> None:
        """Answer no more, and let go of the port."""
        if self._thread.is_alive():  # else it would wait for ever for a loop that never was
            self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        # Without http.server's own, which asks the name service for a name, and may wait for long.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: who went away without its answer asks again."""


class _SixServer(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nothing: it is asked every few seconds."""


def _server(host: str, port: int) -> _Server:
    return (_SixServer if ":" in host else _Server)((host, port), _Handler)


def _pages(pages: Mapping[str, WSGIApplication]) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        page = pages.get(environ.get("PATH_INFO", ""))
        return page(environ, start_response) if page else plain(start_response, http.HTTPStatus.NOT_FOUND)

    return answer


def plain(
    start_response: Callable[..., object],
    status: http.HTTPStatus,
    body: str = "",
    content_type: str = "text/plain; charset=utf-8",
) -> list[bytes]:
    """A short answer of a page."""
    start_response(f"{status.value} {status.phrase}", [("Content-Type", content_type)])
    return [(body or f"{status.phrase}\n").encode()]


def _own_address(broker_url: str) -> str:
    """The address of this machine that the farm's Redis sees, which others of the farm then see too."""
    broker = urlsplit(broker_url)
    try:
        found = socket.getaddrinfo(broker.hostname, broker.port or 6379, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # of datagrams: nothing is sent
                return str(probe.getsockname()[0])
    except (OSError, ValueError):
        pass
    return socket.gethostname()
