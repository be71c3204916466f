"""Keeps a part of the embedded farm running."""

from collections.abc import Callable

from farm.local.home import Home
from farm.local.parts import Part
from farm.local.process import PartProcess
from farm.runtime.supervisor import Fault, KeptProcess, Program, RestartPolicy

FIRST_DELAY_SECONDS, LONGEST_DELAY_SECONDS = 0.5, 15.0
"""The wait before a part restarts; it doubles after each consecutive fault."""
HEALTHY_SECONDS = 30.0


class KeptPart(KeptProcess[PartProcess]):
    """Keeps a part running, and bounds its log."""

    def __init__(self, part: Part, home: Home, report: Callable[[str], None]) -> None:
        program = Program(
            name=part.name,
            start=lambda: part.start(home),
            stop_seconds=part.stop_seconds,
            answers=part.answers,
            ready_seconds=part.ready_seconds,
            survives_kill=part.survives_kill,
        )
        super().__init__(program, RestartPolicy(_delay_seconds, HEALTHY_SECONDS, _restarting), report)
        self.part = part

    def tend(self) -> None:
        """Restart it if need be, report when it is ready again, and bound its log."""
        was_ready = self.ready
        super().tend()
        if self.ready and not was_ready:
            self.report(f"{self.part.name} is back")
        if self.process is not None:
            self.process.bound_log()


def explained(program: Program[PartProcess], fault: Fault[PartProcess]) -> tuple[str, str]:
    """The fault of a part, with the end of its log."""
    seconds = program.ready_seconds
    what = f"does not answer after {seconds:.0f} s" if fault.status is None else f"died (exit {fault.status})"
    lines = "".join(f"\n  | {line}" for line in fault.process.last_lines())
    return f"{program.name} {what}", f"{fault.process.log} ends with{lines or ' nothing'}"


def _restarting(program: Program[PartProcess], fault: Fault[PartProcess], _faults: int, delay: float) -> str:
    what, last_words = explained(program, fault)
    return f"{what}, restarting in {delay:g} s; {last_words}"


def _delay_seconds(faults: int) -> float:
    return min(LONGEST_DELAY_SECONDS, FIRST_DELAY_SECONDS * 2.0 ** (faults - 1))
