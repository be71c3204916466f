"""One part kept running: brought up, watched, and started again when it dies."""

import time
from collections.abc import Callable

from farm.local.home import Home
from farm.local.parts import Part
from farm.local.process import Process

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 15.0
"""How long a dead part waits for its restart: doubled with every death, so that a broken one does not spin."""
HEALTHY_SECONDS = 30.0
"""After so long a part's earlier deaths are forgiven."""


class Kept:
    """A part that is kept running: its present process, or when the next one starts."""

    def __init__(self, part: Part, home: Home, say: Callable[[str], None]) -> None:
        self.part = part
        self.process: Process | None = None
        self._home = home
        self._say = say
        self._ready_at: float | None = None
        self._start_at = 0.0
        self._deaths = 0

    @property
    def ready(self) -> bool:
        """Whether it runs and has answered."""
        return self._ready_at is not None

    def start(self) -> None:
        """Start a process for it."""
        self._ready_at = None
        self.process = Process(self.part, self._home)

    def fault(self) -> str | None:
        """What is wrong with the process; None while it lives, and comes up in time."""
        process = self.process
        if process is None:
            return None
        status = process.ended()
        if status is not None:
            return f"died (exit {status})"
        if not self.ready:
            if self.part.answers(process):
                self._ready_at = time.monotonic()
            elif time.monotonic() - process.started > self.part.ready_seconds:
                return f"does not answer after {self.part.ready_seconds:.0f} s"
        process.bound_log()
        return None

    def last_words(self) -> str:
        """Where its log is, and how that ends."""
        lines = self.process.last_lines() if self.process is not None else []
        said = "".join(f"\n  | {line}" for line in lines)
        return f"{self._home.logs / self.part.name}.log ends with{said or ' nothing'}"

    def tend(self) -> None:
        """Notice a death, and start again when the time has come. Called every 0.1 s."""
        now = time.monotonic()
        if self.process is None:
            if now >= self._start_at:
                self.start()
            return
        was_ready = self.ready
        fault = self.fault()
        if fault is not None:
            delay = min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2**self._deaths)
            self._say(f"{self.part.name} {fault}, restarting in {delay:g} s; {self.last_words()}")
            self._deaths += 1
            self._start_at = now + delay
            self.end()
        elif self._ready_at is not None:
            if not was_ready:
                self._say(f"{self.part.name} is back")
            elif self._deaths and now - self._ready_at > HEALTHY_SECONDS:
                self._deaths = 0

    def end(self) -> None:
        """Kill what is left of the process."""
        self._ready_at = None
        if self.process is not None:
            self.process.clear()
            self.process = None
