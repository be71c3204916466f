"""Hosts as network namespaces, each linked to one router: a link can be cut in both directions or in one.

The network is isolated from the machine's own: both ends of every link are in namespaces, addresses are from the range
that RFC 2544 reserves for tests, and no namespace has a route out. A run deletes its namespaces at its end; those of a
killed run are deleted at the start of the next.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.hosts.slow import Slow, end
from tests.servers import missing

NET = "198.18.0.0/15"
_NAMES = "farm-hosts-"
_NAMESPACES = Path("/run/netns")
_CLONE_NEWNET = 0x4000_0000
_ROUTER = "198.18.0.254"


class Network:
    """A router and hosts by name, each with its own address; needs root and iproute2.

    Raises `OSError` and `CalledProcessError`; the notes of the latter contain the error output of `ip`.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._run = f"{_NAMES}{os.getpid()}"
        self.addresses = {name: f"198.18.0.{place}" for place, name in enumerate(hosts, 1)}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        self._ip = required()
        sweep(self._ip)
        try:
            self._lay()
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def namespace(self, host: str) -> str:
        """Name of a host's namespace."""
        return f"{self._run}-{host}"

    def prefix(self, host: str) -> tuple[str, ...]:
        """Arguments to put before a command to run it on a host, under its hostname; it keeps the process id."""
        named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host)
        return (self._ip, "netns", "exec", self.namespace(host), *named)

    @contextmanager
    def on(self, host: str) -> Iterator[None]:
        """Move this thread, and every process and thread it starts, to a host until the block ends."""
        here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(_NAMESPACES / self.namespace(host))
            try:
                yield
            finally:
                _set(here)
        finally:
            os.close(here)

    def addressed(self, host: str) -> str:
        """Name of the router's end of a host's link."""
        return f"to-{host}"

    # --- faults ---------------------------------------------------------------------------------------------

    @contextmanager
    def cut(self, host: str) -> Iterator[None]:
        """Drop all packets to and from a host; neither side gets an error."""
        self._router("link", "set", "dev", self.addressed(host), "down")
        try:
            yield
        finally:
            self._router("link", "set", "dev", self.addressed(host), "up")
            self._route(host)

    @contextmanager
    def deaf(self, host: str) -> Iterator[None]:
        """Silently drop all packets to a host; packets from it arrive."""
        self._router("route", "replace", "blackhole", self.addresses[host])
        try:
            yield
        finally:
            self._route(host)

    @contextmanager
    def mute(self, host: str) -> Iterator[None]:
        """Silently drop all packets from a host; packets to it arrive."""
        rule = ("from", self.addresses[host], "blackhole")
        self._router("rule", "add", *rule)
        try:
            yield
        finally:
            self._router("rule", "del", *rule)

    @contextmanager
    def slow(self, host: str, seconds: float, loss: float) -> Iterator[Slow]:
        """Delay all packets to and from a host, and drop the fraction `loss` of them."""
        with ExitStack() as undo:
            ends = []
            for where, name in ((host, "slow"), ("router", f"slow-{host}")):
                with self.on(where):
                    ends.append(end(name))
                undo.callback(os.close, ends[-1])
                self._host(where, "link", "set", "dev", name, "up")
            cable = Slow(ends[0], ends[1], seconds, loss)
            undo.callback(cable.close)
            undo.callback(self._route, host)
            self._router("route", "replace", self.addresses[host], "dev", f"slow-{host}")
            undo.callback(self._out, host)
            self._host(host, "route", "replace", NET, "dev", "slow", "src", self.addresses[host])
            yield cable

    # --- setup ----------------------------------------------------------------------------------------------

    def _lay(self) -> None:
        self._add("router")
        self._write("router", "conf/all/rp_filter", "0")  # a deaf host may still send
        self._write("router", "conf/default/rp_filter", "0")
        self._write("router", "ip_forward", "1")
        self._router("address", "add", f"{_ROUTER}/32", "dev", "lo")
        self._router("route", "add", "blackhole", NET)  # no errors for unreachable hosts
        for host, address in self.addresses.items():
            self._add(host)
            inside, outside = ("name", "eth0", "netns", self.namespace(host)), self.addressed(host)
            self._call("link", "add", outside, "netns", self.namespace("router"), "type", "veth", "peer", *inside)
            self._host(host, "address", "add", f"{address}/32", "dev", "eth0")
            self._host(host, "link", "set", "dev", "eth0", "up")
            self._host(host, "route", "add", _ROUTER, "dev", "eth0")
            self._out(host)
            self._router("link", "set", "dev", outside, "up")
            self._route(host)

    def _add(self, host: str) -> None:
        self._call("netns", "add", self.namespace(host))
        self._undo.callback(_delete, self._ip, self.namespace(host))
        self._host(host, "link", "set", "dev", "lo", "up")

    def _out(self, host: str) -> None:
        way = ("via", _ROUTER, "dev", "eth0", "src", self.addresses[host])
        self._host(host, "route", "replace", NET, *way)

    def _route(self, host: str) -> None:
        self._router("route", "replace", self.addresses[host], "dev", self.addressed(host))

    def _write(self, host: str, name: str, value: str) -> None:
        with self.on(host):  # /proc/sys/net shows the namespace of the reader
            Path("/proc/sys/net/ipv4", name).write_text(value, encoding="ascii")

    def _router(self, *arguments: str) -> None:
        self._host("router", *arguments)

    def _host(self, host: str, *arguments: str) -> None:
        self._call("-n", self.namespace(host), *arguments)

    def _call(self, *arguments: str) -> None:
        call(self._ip, *arguments)


def required() -> str:
    """Path of the program `ip`; skips the test if it is missing or namespaces can't be created."""
    program = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin")
    if program is None:
        missing("no network namespaces: install iproute2")
    if os.geteuid() != 0:
        missing("no network namespaces: only root may make them")
    if shutil.which("unshare") is None or shutil.which("hostname") is None:
        missing("hosts can't have names of their own: install util-linux and hostname")
    probe = f"{_NAMES}{os.getpid()}-probe"
    tried = subprocess.run([program, "netns", "add", probe], capture_output=True, text=True, check=False)
    if tried.returncode:
        missing(f"no network namespaces: {tried.stderr.strip()}")
    _delete(program, probe)
    return program


def call(*command: str) -> str:
    """Run a command and return its output; adds its error output to `CalledProcessError`."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    except subprocess.CalledProcessError as error:
        error.add_note(error.stderr)
        raise


def sweep(program: str) -> None:
    """Delete the namespaces of killed runs: those whose name contains the id of a process that has ended."""
    for path in _NAMESPACES.glob(f"{_NAMES}*") if _NAMESPACES.exists() else ():
        pid = path.name.removeprefix(_NAMES).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            _delete(program, path.name)


def _delete(program: str, namespace: str) -> None:
    """Kill the processes in a namespace and delete it; deleting one end of a link deletes the other end too."""
    deadline = time.monotonic() + 10
    while pids := call(program, "netns", "pids", namespace).split():
        for pid in pids:
            if int(pid) != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    call(program, "netns", "delete", namespace)


def _enter(path: Path) -> None:
    there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _set(there)
    finally:
        os.close(there)


def _set(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns needs Python 3.12
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
