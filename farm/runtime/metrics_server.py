"""The HTTP server for a process's Prometheus metrics, and the address at which other machines reach it.

prometheus_client's `start_wsgi_server` can't bind before it answers, serve further pages, or drop slow clients, and
looks up the host's name in DNS. So only `make_wsgi_app` is used, with a server from the standard library.
"""

import http
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Protocol
from urllib.parse import urlsplit
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

from farm.errors import NotConfigured
from farm.settings import Settings

METRICS = "/metrics"
_REQUEST_SECONDS = 10
_ALL_INTERFACES = {"0.0.0.0", "::", ""}  # noqa: S104


class Service(Protocol):
    """A server that a process depends on: the database, Redis, S3."""

    outages: int
    """Calls that it did not answer."""


class MetricsServer:
    """An HTTP server that answers `/metrics` from a registry, and the paths of `pages`.

    It listens on construction and answers after `start`. Raises `NotConfigured` if its port is taken.
    """

    def __init__(
        self, settings: Settings, registry: CollectorRegistry, pages: Mapping[str, WSGIApplication] | None = None
    ) -> None:
        host, port = settings.metrics_host, settings.metrics_port or 0
        try:
            self._server = _Server(host, port, _by_path({METRICS: make_wsgi_app(registry), **(pages or {})}))
        except OSError as error:
            raise NotConfigured(
                f"no metrics at {host}:{port}: {error.strerror or error}; set FARM_METRICS_PORT to another one, "
                "to 0 for any, or to none"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self.port: int = self._server.server_port
        reachable = _own_address(settings.broker_url) if host in _ALL_INTERFACES else host
        self.url = f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{self.port}{METRICS}"
        """The address of `/metrics` for other machines."""

    def start(self) -> None:
        """Answer requests in background threads."""
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port."""
        if self._thread.is_alive():  # `shutdown` waits for the loop to end, forever if it was never started
            self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, application: WSGIApplication) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)
        self.set_app(application)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's looks up the host's name in DNS, which can take long
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect before their answer."""


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_SECONDS

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Log no requests."""


def _by_path(pages: Mapping[str, WSGIApplication]) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        page = pages.get(environ.get("PATH_INFO", ""))
        return page(environ, start_response) if page else respond(start_response, http.HTTPStatus.NOT_FOUND)

    return answer


def respond(
    start_response: Callable[..., object],
    status: http.HTTPStatus,
    body: str = "",
    content_type: str = "text/plain; charset=utf-8",
) -> list[bytes]:
    """Answer a WSGI request with a short body, by default the status's reason phrase."""
    start_response(f"{status.value} {status.phrase}", [("Content-Type", content_type)])
    return [(body or f"{status.phrase}\n").encode()]


def _own_address(broker_url: str) -> str:
    """The address of this machine from which it reaches Redis; other machines of the farm probably reach it there."""
    broker = urlsplit(broker_url)
    try:
        found = socket.getaddrinfo(broker.hostname, broker.port or 6379, type=socket.SOCK_DGRAM)
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # a datagram socket: this sends nothing
                return str(probe.getsockname()[0])
    except (OSError, ValueError):
        pass
    return socket.gethostname()
